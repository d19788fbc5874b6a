"""Where a dense model, the stem of a mixture, or text to calibrate with comes from.

`builder/weights/stem_merge.py` merges stems.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers_moe_offload.builder.recipe.values import Section
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import quoted

STEM_METHODS = ("base", "average", "ties", "dare")


@dataclass(frozen=True, kw_only=True)
class Origin(Section):
    """Where a dense model comes from.

    Args:
        model: a folder, or an id on the Hub; None means the base model, with an adapter.
        revision: branch, tag or commit on the Hub.
        adapter: a LoRA adapter that is merged into the model, tensor by tensor; a folder, id or `id@revision`.
        extract_rank: instead of the model itself, the base model and an approximation, of this rank, of the difference
            between both (truncated singular value decomposition).
    """

    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    extract_rank: int | None = None

    def __post_init__(self) -> None:
        self._expect_texts("model", "revision", "adapter")
        self._expect_whole("extract_rank", least=1)
        if self.adapter is not None and self.extract_rank is not None:
            raise RecipeError(
                f"adapter={quoted(self.adapter)} and extract_rank={self.extract_rank} exclude each other: an adapter "
                "has a rank already; leave one of them out"
            )

        if self.model is None and self.adapter is None:
            raise RecipeError("neither model nor adapter is given; set one of them")

    @classmethod
    def parse(cls, text: str) -> Origin:
        """A model in one line: `model`, `model@revision`, `model+adapter`; a folder of that name is taken literally."""
        if not text or os.path.isdir(text):
            return cls(model=text)
        model, _, adapter = text.partition("+")
        model, _, revision = model.partition("@")
        return cls(model=model or None, revision=revision or None, adapter=adapter or None)

    def __str__(self) -> str:
        model = f"{self.model}@{self.revision}" if self.revision else self.model or "base model"
        return f"{model}+{self.adapter}" if self.adapter else model


def as_origin(value: Origin | str) -> Origin:
    """An origin as it is, or a text parsed by `Origin.parse`."""
    if isinstance(value, str):
        return Origin.parse(value)
    if not isinstance(value, Origin):
        raise RecipeError(f"{quoted(value)} is neither an Origin nor the name of a model")
    return value


@dataclass(frozen=True, kw_only=True)
class Stem(Section):
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
            self._set("source", as_origin(self.source))
        self._expect_choice("method", STEM_METHODS)
        self._expect_numbers("density", "weight")
        self._expect_whole("seed")
        if not 0 < self.density <= 1:
            raise RecipeError(f"density={self.density} is a share, above 0 and at most 1")
        if self.source is not None and self.method != "base":
            raise RecipeError(
                f"stem: source={self.source} takes the stem from one model, method={quoted(self.method)} merges "
                "several; leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class Dataset(Section):
    """Text to calibrate gates with.

    Args:
        path: a text file, a JSON-lines file, or the id of a data set on the Hub (needs `datasets`).
        split: as in `datasets.load_dataset`, for instance `"train[:200]"`.
        text: the column that holds the text.
        max_tokens: how much of it is used.
    """

    path: str
    split: str = "train"
    text: str = "text"
    max_tokens: int = 16384

    def __post_init__(self) -> None:
        self._expect_texts("path", "split", "text")
        self._expect_whole("max_tokens", least=1)
