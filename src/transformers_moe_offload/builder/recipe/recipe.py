"""`MoeRecipe`: what to build, from what, into what. Impossible values are refused here; `reading.py` and `mergekit.py`
read files, `builder/plan` checks that the sources fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers_moe_offload.builder.recipe.experts import Expert, SharedExpert, Split, Upcycle
from transformers_moe_offload.builder.recipe.mergekit import translated
from transformers_moe_offload.builder.recipe.origin import Dataset, Origin, Stem, as_origin
from transformers_moe_offload.builder.recipe.reading import Place, as_plain, load_yaml, read
from transformers_moe_offload.builder.recipe.result import Checks, Hub, Output
from transformers_moe_offload.builder.recipe.routers import AdapterRouting, Gate
from transformers_moe_offload.builder.recipe.values import Section
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import quoted

KINDS = ("moe", "upcycle", "split", "adapter_moe")
SCHEMA = 1
"""The version of the files that recipes are written to."""


@dataclass(frozen=True, kw_only=True)
class MoeRecipe(Section):
    """A mixture of experts to build.

    Args:
        base_model: the dense model whose attention, embeddings, norms and head are used, and whose hidden states the
            gates are computed from.
        kind: `moe` of several dense models, or of one: `upcycle` (copies) or `split` (parts); `adapter_moe` of adapters
            that stay adapters.
        experts: the routed experts, in their order.
        shared_experts: experts that every token visits.
        experts_per_token: how many routed experts a token visits.
        container: the model type to build, as `mixtral`; `auto` takes the first that fits.
        dtype: of the written weights; None means as the base model is stored.
        layers: decoder layers that get experts; the others keep the base model's block. None means all.
        gate: how routers get their weights; by default ridge regression, and noise for the kinds without texts.
        stem: everything but the feed-forward blocks.
        upcycle: for the kind of that name.
        split: for the kind of that name.
        adapter_moe: for the kind of that name.
        checks: what is checked of the result.
        output: how it is written.
        hub: how it is published.
        tokenizer: where the tokenizer comes from; None means the base model.
        seed: of noise on experts.
    """

    base_model: Origin
    kind: str = "moe"
    experts: tuple[Expert, ...] = ()
    shared_experts: tuple[SharedExpert, ...] = ()
    experts_per_token: int = 2
    container: str = "auto"
    dtype: str | None = None
    layers: tuple[int, ...] | None = None
    gate: Gate = None  # type: ignore[assignment]
    stem: Stem = field(default_factory=Stem)
    upcycle: Upcycle | None = None
    split: Split | None = None
    adapter_moe: AdapterRouting | None = None
    tokenizer: str | None = None
    seed: int = 0
    checks: Checks = field(default_factory=Checks)
    output: Output = field(default_factory=Output)
    hub: Hub = field(default_factory=Hub)

    def __post_init__(self) -> None:
        self._set("base_model", as_origin(self.base_model))
        self._expect_choice("kind", KINDS)
        if self.gate is None:
            self._set("gate", Gate(mode="ridge" if self.kind in ("moe", "adapter_moe") else "noise"))
        self._expect_choice("dtype", (None, "float32", "bfloat16", "float16"))
        self._expect_texts("container", "tokenizer")
        self._expect_whole("experts_per_token", least=1)
        self._expect_whole("seed")
        for name in ("experts", "shared_experts"):
            self._set(name, tuple(getattr(self, name)))
        if self.layers is not None:
            if not self.layers or any(type(layer) is not int or not 0 <= layer < 2**31 for layer in self.layers):
                raise RecipeError(f"layers={quoted(list(self.layers))} is not a list of layers, counted from 0")
            self._set("layers", tuple(sorted(set(self.layers))))
        self._expect_kind()
        if self.num_experts < self.experts_per_token:
            there = "is 1 expert" if self.num_experts == 1 else f"are {self.num_experts} experts"
            raise RecipeError(
                f"experts_per_token={self.experts_per_token}, but there {there}; add experts, "
                f"or set experts_per_token to {max(1, self.num_experts)} or less"
            )

    def _expect_kind(self) -> None:
        """Refuse options of another kind, and set this kind's options to their defaults where they are not given."""
        for kind, default in (("upcycle", Upcycle()), ("split", Split()), ("adapter_moe", AdapterRouting())):
            if getattr(self, kind) is not None and self.kind != kind:
                raise RecipeError(
                    f"{kind}: is given, but kind is {quoted(self.kind)}; set kind: {kind}, or leave {kind}: out"
                )
            if self.kind == kind and getattr(self, kind) is None:
                self._set(kind, default)
        if self.kind == "adapter_moe":
            self._expect_adapters()
        if self.kind in ("upcycle", "split") and self.experts:
            raise RecipeError(
                f"kind: {self.kind} makes its experts from the base model, but experts: lists {len(self.experts)}; "
                f"set kind: moe, or leave experts: out"
            )
        if self.kind == "split" and self.shared_experts:
            raise RecipeError(
                "kind: split takes its shared expert from the block that is split; set split.shared, the number of its "
                "parts, and leave shared_experts out"
            )

    def _expect_adapters(self) -> None:
        """Refuse options that change weights or containers: the adapters are not merged."""
        plain: tuple[tuple[str, object], ...] = (
            ("shared_experts", ()), ("stem", Stem()), ("layers", None), ("container", "auto"), ("tokenizer", None),
        )  # fmt: skip
        for name, default in plain:
            if getattr(self, name) != default:
                raise RecipeError(f"kind: adapter_moe has no {name}; leave it out, or build kind: moe")

    @property
    def num_experts(self) -> int:
        """How many routed experts there will be."""
        if self.upcycle is not None:
            return self.upcycle.num_experts * self.upcycle.granularity
        return self.split.num_routed if self.split is not None else len(self.experts)

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """All data sets that gates or parts are calibrated with."""
        owners = (*self.experts, *self.shared_experts, *((self.split,) if self.split else ()))
        return tuple(owner.dataset for owner in owners if owner.dataset is not None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, folder: Path | None = None) -> MoeRecipe:
        """Read the values of `to_dict` or of a YAML file; without `schema:` they are a recipe of mergekit-moe.

        Raises `RecipeError` for whatever it does not know. Relative paths are relative to `folder`.
        """
        if not isinstance(values, Mapping):
            raise RecipeError(f"{quoted(values)} is not a mapping with the keys of a recipe")
        if "schema" not in values:  # ours name it
            values = translated(values)
        values = dict(values)
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise RecipeError(f"schema: {quoted(schema)} is not one that this version reads; it reads schema: {SCHEMA}")
        return read(cls, values, Place(folder=folder))

    @classmethod
    def from_file(cls, path: str | Path) -> MoeRecipe:
        """Read a YAML or JSON file; its relative paths are relative to its own folder."""
        path = Path(path)
        return cls.from_dict(load_yaml(path), folder=path.parent)

    def to_dict(self) -> dict[str, Any]:
        """The values that `from_dict` reads this recipe from: all that differ from their defaults."""
        return {"schema": SCHEMA, **as_plain(self)}
