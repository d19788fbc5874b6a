"""Quantize the experts of a model while it is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn
from transformers.utils import logging

from transformers_moe_offload.config import ExpertFormats
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.formats.by_expert import LayerCodecs
from transformers_moe_offload.hf.loading.codecs import codecs_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.store.encoding import encoded_in_ram, row_sizes
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.system.free_memory import free_ram


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
