"""The layout of a prebuilt checkpoint: names of files and tensors, shards, and the content of its config.

One shard for each sparse layer with two tensors, `{module}.records`, uint8 (E, row bytes), and `{module}.checksums`,
int64 (E,); hot experts are in a third one, `{module}.hot_records`, instead of the first (`hf/loading/records.py`
reads them). Then shards with the dense weights, and an index, written last.

Loading it without this package must fail instead of initialising experts at random: no file has a name that
Transformers looks for, and the code that `config.json` refers to says what is missing.
"""

# E experts of a module

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.hf.loading.records import CHECKSUMS, HOT_RECORDS, RECORDS, Stack, described
from transformers_moe_offload.hf.prebuilt.names import AUTO_CLASSES, GUARD, INDEX_NAME, RECIPE_NAME
from transformers_moe_offload.output.claim import Marks
from transformers_moe_offload.output.shards import MAX_SHARD_BYTES, Content, Shard, grouped, shard_names, shard_of

MARKS = Marks(first=RECIPE_NAME, last=INDEX_NAME, prefix="moe_offload")


@dataclass(frozen=True)
class LayerContent:
    """The experts of one sparse layer, to be written."""

    module: str
    """Path of the experts module in the model."""
    num_experts: int
    fields: tuple[FieldSpec, ...]
    """The stored fields of a record."""
    record: Callable[[int], Tensor]
    """An expert's record, uint8, with or without zeros up to the next page; called from several threads."""
    hot_experts: frozenset[int] = frozenset()
    """Experts whose records have `hot_fields` instead."""
    hot_fields: tuple[FieldSpec, ...] = ()

    @classmethod
    def coded(cls, module: str, num_experts: int, codecs: LayerCodecs, record: Callable[[int], Tensor]) -> LayerContent:
        """The content of a layer all of whose experts have a codec."""
        fields, *hot = (codec.stored for codec in codecs.kinds if codec is not None)
        return cls(module, num_experts, fields, record, codecs.hot_experts, *hot)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of records: one, or two where some experts are hot."""
        num_hot = len(self.hot_experts)
        usual = Stack.of(f"{self.module}.{RECORDS}", self.num_experts - num_hot, self.fields)
        return (usual, Stack.of(f"{self.module}.{HOT_RECORDS}", num_hot, self.hot_fields)) if num_hot else (usual,)

    def stack(self, expert: int) -> Stack:
        """The stack that an expert is in."""
        return self.stacks[expert in self.hot_experts]

    @property
    def checksums(self) -> FieldSpec:
        """The tensor with the checksum of every row, by expert."""
        return FieldSpec(f"{self.module}.{CHECKSUMS}", (self.num_experts,), "int64")

    @property
    def tensors(self) -> tuple[FieldSpec, ...]:
        """The tensors of the layer's shard."""
        return (*(stack.tensor for stack in self.stacks), self.checksums)


Contents = LayerContent | tuple[Content, ...]
"""The content of one shard."""


def shards_of(
    layers: Sequence[LayerContent], dense: Sequence[Content], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Shard[Contents]]:
    """All shards, in the order in which they are written."""
    groups = grouped(dense, max_shard_bytes)
    names = shard_names("moe_offload", len(layers) + len(groups))
    records: list[Shard[Contents]] = [
        Shard(name, layer.tensors, layer, {stack.tensor.name: described(stack.fields) for stack in layer.stacks})
        for name, layer in zip(names, layers, strict=False)
    ]
    others: list[Shard[Contents]] = [
        shard_of(name, group) for name, group in zip(names[len(layers) :], groups, strict=True)
    ]
    return records + others


def plain_config(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json` that saving the plain model in a dtype would write."""
    model.config.dtype = dtype_name(dtype)
    model.config.architectures = [type(model).__name__]
    plain: dict[str, Any] = json.loads(model.config.to_json_string())
    return plain


def prebuilt_config(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json`, from the plain model's and the `OffloadConfig.recipe` of its quantization."""
    return {key: value for key, value in config.items() if key != "transformers_weights"} | {
        "auto_map": {name: f"{GUARD.stem}.{name}" for name in AUTO_CLASSES},
        "quantization_config": dict(recipe),
    }
