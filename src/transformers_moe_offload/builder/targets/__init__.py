"""The containers, and the ones that can hold a given dense model."""

from __future__ import annotations

from transformers import PreTrainedConfig

from transformers_moe_offload.builder.targets.base import ROLES, Container, Matrix, MoeShape
from transformers_moe_offload.builder.targets.granite import GraniteMoe, GraniteMoeShared
from transformers_moe_offload.builder.targets.mixtral import Mixtral
from transformers_moe_offload.builder.targets.one_family import Cohere2Moe, Ernie45Moe, FlexOlmo, HunYuanMoe, Lfm2Moe
from transformers_moe_offload.builder.targets.qwen import Qwen2Moe, Qwen3Moe, Qwen35Moe
from transformers_moe_offload.builder.targets.refusals import PAIRS
from transformers_moe_offload.builder.targets.sigmoid import Dots1, Glm4Moe, SolarOpen
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.nearest import did_you_mean
from transformers_moe_offload.untrusted import quoted

__all__ = ["CONTAINERS", "ROLES", "Container", "Matrix", "MoeShape", "candidates", "container_for"]

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


def candidates(name: str, config: PreTrainedConfig) -> tuple[Container, ...]:
    """The container of this name, or all that may hold the dense model if the name is `auto`.

    Raises `RecipeError` with the reason if there is none.
    """
    if name != "auto":
        return (_named(name, config),)
    found = container_for(config)
    if not found:
        known = sorted({kind for one in CONTAINERS for kind in one.dense})
        raise RecipeError(
            f"no container holds a {config.model_type}; base models can be {', '.join(known)} (a mixture of any other "
            f"kind would need code that Transformers does not have)"
        )
    return found


def container_for(config: PreTrainedConfig) -> tuple[Container, ...]:
    """The containers that may hold a dense model of this kind."""
    return tuple(one for one in CONTAINERS if config.model_type in one.dense)


def _named(name: str, config: PreTrainedConfig) -> Container:
    known = {one.name: one for one in CONTAINERS}
    reason = PAIRS.get((config.model_type, name))
    if reason is not None:
        raise RecipeError(f"a {config.model_type} cannot become a {name}: {reason}")
    if name not in known:
        raise RecipeError(
            f"container={quoted(name)} is not one that is built{did_you_mean(name, known)} (there are "
            f"{', '.join(known)})"
        )
    if config.model_type not in known[name].dense:
        raise RecipeError(
            f"a {config.model_type} cannot become a {name}, which holds {', '.join(known[name].dense)}; set container "
            f"to {' or '.join(one.name for one in container_for(config)) or 'another one'}, or leave it out"
        )
    return known[name]
