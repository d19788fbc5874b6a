"""Where everything but the feed-forward blocks comes from; `builder/weights/stem_merge.py` merges it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.builder.recipe.origin import Origin, as_origin
from transformers_moe_offload.builder.recipe.values import expect_choice, expect_numbers, expect_whole
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import quoted

STEM_METHODS = ("base", "average", "ties", "dare")


@dataclass(frozen=True, kw_only=True)
class Stem:
    """Everything but the feed-forward blocks: attention, embeddings, norms, head.

    Args:
        method: the `base` model's, or the experts' sources merged: `average`, `ties` (arXiv 2306.01708) or `dare`
            (arXiv 2311.03099).
        source: another model to take it from; goes with `method="base"`.
        density: share of each difference that TIES or DARE keeps.
        weight: factor on the merged difference.
        seed: of what DARE drops.
    """

    method: str = "base"
    source: Origin | None = None
    density: float = 0.5
    weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source is not None:
            object.__setattr__(self, "source", as_origin(self.source))
        expect_choice(self, "method", STEM_METHODS)
        expect_numbers(self, "density", "weight")
        expect_whole(self, "seed")
        if not 0 < self.density <= 1:
            raise RecipeError(f"density={self.density} is a share, above 0 and at most 1")
        if self.source is not None and self.method != "base":
            raise RecipeError(
                f"stem: source={self.source} takes the stem from one model, method={quoted(self.method)} merges "
                "several; leave one of them out"
            )
