"""The offloaded layers of a model, and where their experts are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.hf.model.layer import OffloadedExperts, SparseLayer, layer_of
from transformers_moe_offload.store.expert_store import ExpertStore


def sparse_layers(model: Any) -> list[tuple[nn.Module, SparseLayer]]:
    """Each experts module with its layer, in the order of the model."""
    found: list[tuple[nn.Module, SparseLayer]] = [
        (module, layer_of(module)) for module in model.modules() if isinstance(module, OffloadedExperts)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no offloaded experts to measure; load it with moe_offload=OffloadConfig(...)"
        )
    return found


def cache_of(layer: SparseLayer) -> ExpertCache:
    """The cache that serves a layer where it is."""
    assert layer.runtime is not None
    return layer.runtime.cache_for(layer, layer.device)


def store_of(model: Any) -> ExpertStore:
    """The store of a model's experts."""
    return ExpertStore([layer.runtime.source(layer) for _, layer in sparse_layers(model) if layer.runtime is not None])


def files_of(store: ExpertStore) -> list[Path]:
    """Every file that holds experts."""
    return sorted({piece.file.path for piece in _pieces(store)})


def _pieces(store: ExpertStore) -> Iterator[Any]:
    for source in store.layers.values():
        for expert in source.experts:
            yield from expert.pieces
