"""Make the codecs of a layer's experts from formats: which matrices are quantized, and how each is stored. Quantize a
model's experts by them while it is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.utils import logging

from transformers_moe_offload.config import ExpertFormats, HqqFormat
from transformers_moe_offload.config.formats import GROUP_SIZES
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.store.encoding import encoded_in_ram, row_sizes
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.system.free_memory import free_ram


def plain_fields(layer: SparseLayer) -> tuple[FieldSpec, ...]:
    """The fields of a layer's experts as the model has them."""
    return tuple(FieldSpec(field.name, field.shape, dtype_name(field.dtype)) for field in layer.fields)


def codecs_of(model: Any, layer: SparseLayer, fields: Sequence[FieldSpec], formats: ExpertFormats) -> LayerCodecs:
    """How to store each expert of a layer; every codec is an `ExpertCodec`, also of experts that stay unquantized.

    Raises `ConfigError` if a group size does not divide a matrix, with the layer's name and the sizes that do.
    """
    is_transposed = layer.layout.is_transposed(model.get_submodule(layer.name))
    usual, hot, hot_experts = formats.of_layer(layer.index), formats.hot, formats.hot_of_layer(layer.index)
    if len(hot_experts) == layer.num_experts:
        usual = hot
    if not hot_experts or usual == hot:
        return LayerCodecs(_codec(layer.name, tuple(fields), usual, is_transposed))
    usual_codec, hot_codec = (_codec(layer.name, tuple(fields), format, is_transposed) for format in (usual, hot))
    return LayerCodecs(usual_codec, hot_codec, hot_experts)


def _codec(name: str, fields: tuple[FieldSpec, ...], format: HqqFormat | None, is_transposed: bool) -> ExpertCodec:
    try:
        return ExpertCodec(fields, format, is_transposed)
    except ConfigError as error:
        assert format is not None
        sizes = [size for size in GROUP_SIZES if _fits(fields, replace(format, group_size=size), is_transposed)]
        fitting = f"group sizes that fit are {sizes}" if sizes else "no group size fits"
        raise ConfigError(f"{name}: {error}; {fitting}") from error


def _fits(fields: tuple[FieldSpec, ...], format: HqqFormat, is_transposed: bool) -> bool:
    try:
        ExpertCodec(fields, format, is_transposed)
    except ConfigError:
        return False
    return True


def codecs_to_be(
    model: nn.Module, layers: Sequence[SparseLayer], sources: Sequence[LayerSource], formats: ExpertFormats
) -> list[LayerCodecs]:
    """How the experts of each layer will be stored; raises `ConfigError` if the formats do not fit them."""
    formats.check([layer.num_experts for layer in layers])
    return [codecs_of(model, layer, source.spec.fields, formats) for layer, source in zip(layers, sources, strict=True)]


def quantized(
    model: nn.Module, layers: Sequence[SparseLayer], sources: Sequence[LayerSource], formats: ExpertFormats
) -> list[LayerSource]:
    """The same layers with their experts quantized in RAM; experts without a format stay where they are.

    Raises `ConfigError`, before quantizing any, if there is not enough RAM.
    """
    pairs = list(zip(sources, codecs_to_be(model, layers, sources, formats), strict=True))
    sizes = [row_sizes(codecs, len(source.experts)) for source, codecs in pairs]
    needed = sum(sum(of_layer.values()) for of_layer in sizes)
    free = free_ram()
    if needed > free:
        raise ConfigError(
            f"the quantized experts take {needed:,} bytes of RAM, of which {free:,} are free; write them to disk once "
            f"with `moe-offload quantize` and load what it wrote, or choose fewer bits"
        )
    workers = os.cpu_count() or 1
    with logging.tqdm(total=sum(map(len, sizes)), desc="Quantizing experts") as bar:
        return [encoded_in_ram(source, codecs, workers, bar.update) for source, codecs in pairs]
