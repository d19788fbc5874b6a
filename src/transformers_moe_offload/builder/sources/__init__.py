"""Dense weights, one tensor at a time, from any kind of source."""

from __future__ import annotations

from pathlib import Path

from transformers_moe_offload.builder.recipe import Origin
from transformers_moe_offload.builder.sources.adapter import AdapterSource
from transformers_moe_offload.builder.sources.base import Ancestor, Source
from transformers_moe_offload.builder.sources.checkpoint import CheckpointSource
from transformers_moe_offload.builder.sources.extracted import ExtractedSource
from transformers_moe_offload.errors import RecipeError

__all__ = ["AdapterSource", "Ancestor", "CheckpointSource", "ExtractedSource", "Source", "open_source"]


def open_source(
    origin: Origin, *, base: Source | None = None, token: str | None = None, local_files_only: bool = False
) -> Source:
    """The model that an origin names; `base` is the recipe's base model, None while that one itself is opened."""
    options = {"token": token, "local_files_only": local_files_only}
    if origin.model is None:
        if base is None:
            raise RecipeError("base_model names no model; set base_model.model")
        source: Source = base
    else:
        name, revision = _split(origin.model, origin.revision)
        source = CheckpointSource.open(name, {**options, "revision": revision})
    if origin.adapter is not None:
        name, revision = _split(origin.adapter, None)
        return AdapterSource.open(source, name, {**options, "revision": revision})
    if origin.extract_rank is not None:
        if base is None:
            raise RecipeError(f"extract_rank={origin.extract_rank} of the base model is not defined; leave it out")
        return ExtractedSource(source, base, origin.extract_rank)
    return source


def _split(name: str, revision: str | None) -> tuple[str, str]:
    """A name and its revision, which may follow it after an @."""
    if Path(name).is_dir():
        return name, "main"
    name, _, suffix = name.partition("@")
    return name, revision or suffix or "main"
