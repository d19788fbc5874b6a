"""Experts from one dense model alone: copies of its feed-forward blocks, or parts of them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.builder.recipe.origin import Dataset
from transformers_moe_offload.builder.recipe.values import expect_choice, expect_numbers, expect_positive, expect_whole
from transformers_moe_offload.errors import RecipeError

SPLIT_METHODS = ("random", "k_means", "co_activation")


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """Experts that are copies of one dense model's feed-forward blocks (kind `upcycle`).

    Args:
        num_experts: how many.
        granularity: cut each copy into this many experts (arXiv 2410.07524); its weights are scaled so that the sum
            over a token's experts keeps the dense block's size.
        reinitialize: share of each expert's channels that is drawn anew from the block's own statistics (Drop-
            Upcycling, arXiv 2502.19261).
        seed: of what is drawn.
    """

    num_experts: int = 8
    granularity: int = 1
    reinitialize: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        expect_positive(self, "num_experts", "granularity")
        expect_numbers(self, "reinitialize")
        expect_whole(self, "seed")
        if not 0 <= self.reinitialize < 1:
            raise RecipeError(f"reinitialize={self.reinitialize} is a share, from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Experts that are parts of one dense model's feed-forward blocks (kind `split`).

    Args:
        num_experts: into how many parts.
        method: which channels go together: `random`, `k_means` on the weights, or those that are active together on
            calibration text (`co_activation`).
        shared: how many parts make up a block that every token visits, where the container has shared experts.
        dataset: the calibration text.
        seed: of whatever is drawn.
    """

    num_experts: int = 8
    method: str = "k_means"
    shared: int = 0
    dataset: Dataset | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        expect_positive(self, "num_experts")
        expect_choice(self, "method", SPLIT_METHODS)
        expect_whole(self, "shared", "seed")
        if self.shared >= self.num_experts:
            raise RecipeError(f"shared={self.shared} of num_experts={self.num_experts} parts leaves none to be routed")

    @property
    def num_routed(self) -> int:
        """Parts that are routed."""
        return self.num_experts - self.shared
