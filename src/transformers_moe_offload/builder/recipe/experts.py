"""What experts are made of: blocks of several dense models, or of one; `builder/weights/blocks.py` reads them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.builder.recipe.origin import Dataset, Origin, as_origin
from transformers_moe_offload.builder.recipe.values import Section
from transformers_moe_offload.errors import RecipeError

SPLIT_METHODS = ("random", "k_means", "co_activation")


@dataclass(frozen=True, kw_only=True)
class Expert(Section):
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
            self._set("source", as_origin(self.source))
        self._freeze_texts("positive_prompts", "negative_prompts")
        self._expect_texts("name")
        self._expect_numbers("noise_scale", "residual_scale", "delta_scale")
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


@dataclass(frozen=True, kw_only=True)
class Upcycle(Section):
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
        self._expect_whole("num_experts", "granularity", least=1)
        self._expect_numbers("reinitialize")
        self._expect_whole("seed")
        if not 0 <= self.reinitialize < 1:
            raise RecipeError(f"reinitialize={self.reinitialize} is a share, from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Split(Section):
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
        self._expect_whole("num_experts", least=1)
        self._expect_choice("method", SPLIT_METHODS)
        self._expect_whole("shared", "seed")
        if self.shared >= self.num_experts:
            raise RecipeError(f"shared={self.shared} of num_experts={self.num_experts} parts leaves none to be routed")

    @property
    def num_routed(self) -> int:
        """Parts that are routed."""
        return self.num_experts - self.shared
