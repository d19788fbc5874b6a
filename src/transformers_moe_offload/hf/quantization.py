"""Quantize the experts of a model while it is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil
from torch import nn
from transformers.utils import logging

from transformers_moe_offload.config import ExpertFormats
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.coding import LayerCoding
from transformers_moe_offload.hf.layer import SparseLayer
from transformers_moe_offload.memory.checkpoint import LayerSource
from transformers_moe_offload.memory.encoding import encoded_bytes, encoded_in_ram


def coding_of(
    model: nn.Module, layer: SparseLayer, fields: tuple[FieldSpec, ...], formats: ExpertFormats
) -> LayerCoding | None:
    """How a layer's experts are to be stored; None where they stay as they are.

    Raises `ConfigError` if the group size does not divide a matrix.
    """
    format = formats.of_layer(layer.index)
    if format is None:
        return None
    return LayerCoding(fields, format, layer.layout.is_transposed(model.get_submodule(layer.name)))


def quantized(
    model: nn.Module, layers: Sequence[SparseLayer], sources: Sequence[LayerSource], formats: ExpertFormats
) -> list[LayerSource]:
    """The same layers with their experts quantized, in RAM.

    Raises `ConfigError` before the first one if there is not enough of it.
    """
    formats.check(len(layers))
    codings = [
        coding_of(model, layer, source.spec.fields, formats) for layer, source in zip(layers, sources, strict=True)
    ]
    coded = [(source, coding) for source, coding in zip(sources, codings, strict=True) if coding is not None]
    needed, free = encoded_bytes(coded), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"the quantized experts take {needed:,} bytes of RAM, of which {free:,} are free; write them to disk once "
            f"with `moe-offload quantize` and load what it wrote, or choose fewer bits"
        )
    workers = os.cpu_count() or 1
    with logging.tqdm(total=sum(len(source.experts) for source, _ in coded), desc="Quantizing experts") as bar:
        return [
            source if coding is None else encoded_in_ram(source, coding, workers, bar.update)
            for source, coding in zip(sources, codings, strict=True)
        ]
