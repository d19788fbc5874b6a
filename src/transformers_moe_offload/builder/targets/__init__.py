"""The containers, and the ones that can hold a given dense model."""

from __future__ import annotations

from transformers import PreTrainedConfig

from transformers_moe_offload.builder.targets.base import ROLES, Container, Matrix, MoeShape
from transformers_moe_offload.builder.targets.llama_and_qwen import (
    Dots1,
    Glm4Moe,
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    Qwen35Moe,
    SolarOpen,
)
from transformers_moe_offload.builder.targets.one_family import (
    Cohere2Moe,
    Ernie45Moe,
    FlexOlmo,
    GraniteMoe,
    GraniteMoeShared,
    HunYuanMoe,
    Lfm2Moe,
)
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.nearest import did_you_mean
from transformers_moe_offload.untrusted import quoted

__all__ = ["BY_NAME", "CONTAINERS", "ROLES", "Container", "Matrix", "MoeShape", "candidates"]

CONTAINERS: tuple[Container, ...] = (
    Mixtral(),
    Qwen3Moe(),
    Qwen2Moe(),
    FlexOlmo(),
    GraniteMoe(),
    GraniteMoeShared(),
    Ernie45Moe(),
    HunYuanMoe(),
    Cohere2Moe(),
    Lfm2Moe(),
    Qwen35Moe(),
    Glm4Moe(),
    Dots1(),
    SolarOpen(),
)
"""In the order in which they are tried: the most widely understood first."""

BY_NAME = {one.name: one for one in CONTAINERS}

_MULTIPLIERS = (
    "granite scales embeddings, attention, residuals and logits by factors of its own, which a llama does not have"
)

_REFUSED = {
    ("olmo2", "olmoe"): "olmo2 has its norms after attention and block, olmoe before",
    ("olmo3", "flex_olmo"): "some of its layers attend to a window, and flex_olmo's do not",
    ("glm4", "glm4_moe"): "glm4 has norms after attention and block that glm4_moe does not have",
    ("phi3", "phimoe"): "phi3 has RMS norms, phimoe layer norms with biases",
    ("llama", "granitemoe"): _MULTIPLIERS,
    ("llama", "granitemoeshared"): _MULTIPLIERS,
    ("llama", "minimax_m2"): "minimax_m2 has norms on queries and keys, llama has none",
    ("llama", "qwen3_moe"): "qwen3_moe has norms on queries and keys, llama has none",
    ("llama", "afmoe"): "afmoe has norms on queries and keys and a gate on attention, llama has none",
    ("llama", "ernie4_5_moe"): "rotary embeddings turn neighbours in ernie4_5_moe and halves of a head in llama",
    ("smollm3", "mixtral"): "smollm3 leaves the rotary embedding out in every fourth layer, mixtral in none",
}
"""Pairs of a dense model and a container that look equivalent and are not, and why each is refused.

Found by comparing logits: n copies of the dense model's blocks as experts have to give the dense model's logits, and
with these pairs they do not.
"""


def candidates(name: str, config: PreTrainedConfig) -> tuple[Container, ...]:
    """The container of this name, or all that may hold the dense model if the name is `auto`.

    Raises `RecipeError` with the reason if there is none.
    """
    if name != "auto":
        return (_named(name, config),)
    found = _holding(config)
    if not found:
        known = sorted({kind for one in CONTAINERS for kind in one.dense})
        raise RecipeError(
            f"no container holds a {config.model_type}; base models can be {', '.join(known)} (a mixture of any other "
            f"kind would need code that Transformers does not have)"
        )
    return found


def _holding(config: PreTrainedConfig) -> tuple[Container, ...]:
    """The containers that may hold a dense model of this kind."""
    return tuple(one for one in CONTAINERS if config.model_type in one.dense)


def _named(name: str, config: PreTrainedConfig) -> Container:
    reason = _REFUSED.get((config.model_type, name))
    if reason is not None:
        raise RecipeError(f"a {config.model_type} cannot become a {name}: {reason}")
    if name not in BY_NAME:
        raise RecipeError(
            f"container={quoted(name)} is not one that is built{did_you_mean(name, BY_NAME)} (there are "
            f"{', '.join(BY_NAME)})"
        )
    if config.model_type not in BY_NAME[name].dense:
        raise RecipeError(
            f"a {config.model_type} cannot become a {name}, which holds {', '.join(BY_NAME[name].dense)}; set "
            f"container to {' or '.join(one.name for one in _holding(config)) or 'another one'}, or leave it out"
        )
    return BY_NAME[name]
