"""The offloaded layers of a model, and where their experts are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of, offloaded
from transformers_moe_offload.hf.model.layer_forward import LayerExperts
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
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


def experts_of(module: nn.Module) -> LayerExperts:
    """The cache that serves a module where it is, and how its experts are stored."""
    held = offloaded(module)
    return held.ready(held.layer.device).experts


def store_of(model: Any) -> ExpertStore:
    """The store of a model's experts."""
    return ExpertStore([model.moe_offload.source(layer) for layer in model.moe_offload.layers])


def files_of(store: ExpertStore) -> list[Path]:
    """Every file that holds experts."""
    experts = [expert for source in store.layers.values() for expert in source.experts]
    return sorted({piece.file.path for expert in experts for piece in expert.pieces})
