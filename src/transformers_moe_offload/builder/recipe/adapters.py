"""How adapters are mixed without being merged."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.builder.recipe.values import expect_choice, expect_numbers
from transformers_moe_offload.errors import RecipeError

ROUTER_PER = ("ffn", "linear", "model")
SCORINGS = ("softmax", "sigmoid", "arrow", "uniform")


@dataclass(frozen=True, kw_only=True)
class AdapterRouting:
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
        expect_choice(self, "router_per", ROUTER_PER)
        expect_choice(self, "scoring", SCORINGS)
        expect_numbers(self, "temperature")
        if not self.temperature > 0:
            raise RecipeError(f"temperature={self.temperature} is not a positive number")
