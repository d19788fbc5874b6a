"""The options of one expert; `builder/weights/blocks.py` reads and changes its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.builder.recipe.origin import Dataset, Origin, as_origin
from transformers_moe_offload.builder.recipe.values import expect_numbers, expect_texts, freeze_texts
from transformers_moe_offload.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One routed expert: the feed-forward blocks of a dense model, and what should be sent to it.

    Args:
        source: the dense model it is taken from; None means the base model.
        name: what it is called in reports and on the card; by default the source's.
        positive_prompts: texts that should be routed to it.
        negative_prompts: texts that should not.
        dataset: more text that should be routed to it.
        noise_scale: standard deviation of normal noise on its weights.
        residual_scale: factor on what it adds to the residual stream.
        delta_scale: how far it goes from the base model towards its source: base + delta_scale * (source - base).
    """

    source: Origin | None = None
    name: str | None = None
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    dataset: Dataset | None = None
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    delta_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.source is not None:
            object.__setattr__(self, "source", as_origin(self.source))
        freeze_texts(self, "positive_prompts", "negative_prompts")
        expect_texts(self, "name")
        expect_numbers(self, "noise_scale", "residual_scale", "delta_scale")
        if self.noise_scale < 0:
            raise RecipeError(f"noise_scale={self.noise_scale} is a standard deviation and cannot be negative")


@dataclass(frozen=True, kw_only=True)
class SharedExpert(Expert):
    """An expert that every token visits.

    Args:
        gated: its output is weighted by a gate of its own, where the container has one.
        delta: routed experts hold the difference to it only, so that an expert and it add up to the expert's source.
    """

    gated: bool = False
    delta: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gated and self.delta:
            raise RecipeError(
                "gated and delta exclude each other: a gate scales the shared expert, so experts that hold the "
                "difference to it would not add up to their source; leave one of them out"
            )
