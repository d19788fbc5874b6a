"""Turn formats into codecs for the experts of a layer: which matrices are quantized, and how each is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers_moe_offload.config import ExpertFormats, HqqFormat
from transformers_moe_offload.config.formats import GROUP_SIZES
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer


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
