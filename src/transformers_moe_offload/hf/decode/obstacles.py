"""Why a layer cannot decode on the device, checked before anything is built."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.device_decode.forward import missing_on_device
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.store.record import RecordLayout

logger = logging.getLogger(__name__)


def obstacles_of(
    layers: Sequence[SparseLayer], sources: Mapping[int, LayerSource], config: OffloadConfig
) -> dict[str, str]:
    """Module path of a layer -> why it cannot decode on the device."""
    found = {layer.name: obstacle(layer, sources[layer.index], config) for layer in layers}
    return {name: reason for name, reason in found.items() if reason is not None}


def obstacle(layer: SparseLayer, source: LayerSource, config: OffloadConfig) -> str | None:
    """Why a layer cannot decode on its device; None if it can."""
    if config.decode == "host":
        return "decode='host'"
    if config.arithmetic == "exact":
        return "arithmetic='exact' computes with the model's own code"
    if layer.mlp is None:
        return f"the arithmetic of {layer.plain_class.__name__} is not supported"
    return missing_on_device(layer.mlp, record_layout(source), source.codecs, layer.device)


def record_layout(source: LayerSource) -> RecordLayout:
    """The layout of the records of a layer's experts, except hot ones."""
    codec = source.codecs.usual
    return RecordLayout(source.spec.fields if codec is None else codec.stored)


def report(obstacles: Mapping[str, str], num_layers: int, config: OffloadConfig) -> None:
    """Log, once per loaded model, which layers do not decode on the device although the config asks for it."""
    if config.decode == "host" or not obstacles:
        return
    if len(obstacles) == num_layers and len(set(obstacles.values())) == 1:
        reason = next(iter(obstacles.values()))
        logger.warning(f"decode={config.decode!r} has no effect: {reason}")
        return
    for reason in dict.fromkeys(obstacles.values()):
        names = [name for name, other in obstacles.items() if other == reason]
        logger.warning(f"{len(names)} of {num_layers} sparse layers, {names[0]} first, decode on the host: {reason}")
