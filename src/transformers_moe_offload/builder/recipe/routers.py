"""How routers get their weights, which `builder/gates` computes, and how those of a mixture of adapters choose."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.builder.recipe.values import Section
from transformers_moe_offload.errors import RecipeError

GATE_MODES = (
    "ridge", "mean", "hidden", "hidden_avg", "cheap_embed", "random", "uniform", "noise", "orthogonal", "base_first",
    "gateless",
)  # fmt: skip
DRAWN = ("random", "uniform", "noise", "orthogonal", "gateless")
"""Modes that read no text: rows are drawn from a seed, or zero for all experts."""
BAKED = "baked"
"""The mode in recipes that `bake_adapters` writes: rows are those of a mixture of adapters. `build_moe` refuses it."""

ROUTER_PER = ("ffn", "linear", "model")
SCORINGS = ("softmax", "sigmoid", "arrow", "uniform")


@dataclass(frozen=True, kw_only=True)
class Gate(Section):
    """How the routers get their weights.

    Args:
        mode: `ridge` regression onto the experts, the `mean` of their texts' hidden states, mergekit's `hidden` (last
            token) and `hidden_avg`, `cheap_embed`dings; without texts: `random`, `uniform`, `noise`, `orthogonal`,
            `base_first` (the first expert unless trained otherwise), `gateless` (all experts alike). Recipes beside
            what `bake_adapters` has written say `baked`: rows are those of the mixture of adapters.
        site: where hidden states are read: `router_input`, or `layer_input` as mergekit does.
        pool: `mean` over tokens or the `last` one, for `mode="mean"`.
        skip_bos: leave out the first token, whose hidden state is an outlier.
        center: take away what all experts' rows have in common.
        scale: of the rows; `auto` calibrates it to `target_entropy`.
        target_entropy: of the routing weights before the top k are taken, as a share of its maximum, 0 to 1.
        regularization: of the ridge regression, as a share of the hidden states' mean square.
        scoring: `mergekit` computes gates exactly as mergekit-moe 0.1.5 does, `ours` in float32.
        seed: of whatever is drawn.
    """

    mode: str = "ridge"
    site: str = "router_input"
    pool: str = "mean"
    skip_bos: bool = True
    center: bool = True
    scale: float | str = "auto"
    target_entropy: float = 0.7
    regularization: float = 0.01
    scoring: str = "ours"
    seed: int = 0

    def __post_init__(self) -> None:
        self._expect_choice("mode", GATE_MODES if self.mode != BAKED else (BAKED,))
        self._expect_choice("site", ("router_input", "layer_input"))
        self._expect_choice("pool", ("mean", "last"))
        self._expect_choice("scoring", ("ours", "mergekit"))
        self._expect_numbers("target_entropy", "regularization")
        if isinstance(self.scale, str):
            self._expect_choice("scale", ("auto",))
        else:
            self._expect_numbers("scale")
            if not self.scale > 0:
                raise RecipeError(f"scale={self.scale} is not a positive number, or 'auto'")
        self._expect_whole("seed")
        if not 0 < self.target_entropy < 1:
            raise RecipeError(f"target_entropy={self.target_entropy} is a share between 0 and 1")
        if not self.regularization > 0:
            raise RecipeError(f"regularization={self.regularization} is not a positive number")


@dataclass(frozen=True, kw_only=True)
class AdapterRouting(Section):
    """The routers of a mixture of adapters (kind `adapter_moe`).

    Args:
        router_per: what shares a router: the linear layers of one feed-forward block (`ffn`; others have one each),
            each `linear` layer has its own, or the whole `model` has one, on the embeddings.
        scoring: how logits become weights: `softmax` over the chosen adapters, `sigmoid` of each, `arrow` (softmax over
            their size; the routers' rows are then the adapters' own top right singular vectors, arXiv 2405.11157), or
            `uniform`: all adapters alike, without routers.
        temperature: logits are divided by it.
    """

    router_per: str = "ffn"
    scoring: str = "softmax"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self._expect_choice("router_per", ROUTER_PER)
        self._expect_choice("scoring", SCORINGS)
        self._expect_numbers("temperature")
        if not self.temperature > 0:
            raise RecipeError(f"temperature={self.temperature} is not a positive number")
