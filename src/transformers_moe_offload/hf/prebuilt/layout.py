"""What a prebuilt checkpoint looks like: names of files and tensors, shards, and what its config says.

One shard for each sparse layer with two tensors, `{module}.records`, uint8 (E, row bytes), and `{module}.checksums`,
int64 (E,); hot experts are in a third one, `{module}.hot_records`, instead of the first (`hf/records.py` reads them).
Then shards with the dense weights; and an index, written last. Loading it without this package must fail and not make
up experts: no file has a name that Transformers looks for, and the code that `config.json` refers to says what is
missing.
"""

# E experts of a module

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.expert import ITEMSIZE, FieldSpec
from transformers_moe_offload.formats.by_expert import LayerCodings
from transformers_moe_offload.hf.records import CHECKSUMS, HOT_RECORDS, RECORDS, Stack, described
from transformers_moe_offload.memory.record import dtype_name
from transformers_moe_offload.memory.safetensors_writer import file_bytes

INDEX_NAME = "moe_offload.safetensors.index.json"
RECIPE_NAME = "moe_offload.recipe.json"
GUARD = Path(__file__).with_name("moe_offload_required.py")
"""Goes into every prebuilt checkpoint as it is."""
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
"""What the guard has a stand-in for."""
MAX_SHARD_BYTES = 5 * 10**9
"""Of a shard with dense weights, unless one tensor is larger: the size that the Hub recommends."""


@dataclass(frozen=True)
class LayerContent:
    """The experts of one sparse layer, to be written."""

    module: str
    """Path of the experts module in the model."""
    num_experts: int
    fields: tuple[FieldSpec, ...]
    """What a record is made of, as stored."""
    record: Callable[[int], Tensor]
    """An expert's record, uint8, with or without zeros up to the next page; called from several threads."""
    hot_experts: frozenset[int] = frozenset()
    """Experts whose records are made of other fields."""
    hot_fields: tuple[FieldSpec, ...] = ()

    @classmethod
    def coded(
        cls, module: str, num_experts: int, codings: LayerCodings, record: Callable[[int], Tensor]
    ) -> LayerContent:
        """Experts of which each has a coding."""
        fields, *hot = (coding.stored for coding in codings.kinds if coding is not None)
        return cls(module, num_experts, fields, record, codings.hot_experts, *hot)

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


@dataclass(frozen=True)
class DenseContent:
    """Dense tensors that come from one computation, to be written: a weight, or the parts of a quantized one."""

    tensors: tuple[FieldSpec, ...]
    read: Callable[[], Mapping[str, Tensor]]
    """The tensors by name; called once."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint, and where its tensors come from."""

    name: str
    tensors: tuple[FieldSpec, ...]
    """In the order of the file."""
    content: LayerContent | tuple[DenseContent, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says beside its tensors: of records, what they are made of."""
        if isinstance(self.content, LayerContent):
            return {stack.tensor.name: described(stack.fields) for stack in self.content.stacks}
        return {}

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return file_bytes(self.tensors, self.metadata)


def shards_of(
    layers: Sequence[LayerContent], dense: Sequence[DenseContent], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """All shards, in the order in which they are written."""
    groups = _groups(dense, max_shard_bytes)
    total = len(layers) + len(groups)
    names = [f"moe_offload-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    shards = [Shard(name, layer.tensors, layer) for name, layer in zip(names, layers, strict=False)]
    for name, group in zip(names[len(layers) :], groups, strict=True):
        tensors = [tensor for content in group for tensor in content.tensors]
        # Wide elements first, as safetensors does: so all of them are aligned, in a file that may have no gaps.
        shards.append(Shard(name, tuple(sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor.dtype])), group))
    return shards


def _groups(dense: Sequence[DenseContent], max_shard_bytes: int) -> list[tuple[DenseContent, ...]]:
    groups: list[list[DenseContent]] = []
    room = 0
    for content in dense:
        if not groups or content.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(content)
        room -= content.nbytes
    return [tuple(group) for group in groups]


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """What the index file says: which shard holds what."""
    return {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.tensors)},
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }


def plain_config(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json` as saving the plain model in a dtype would write it."""
    model.config.dtype = dtype_name(dtype)
    model.config.architectures = [type(model).__name__]
    plain: dict[str, Any] = json.loads(model.config.to_json_string())
    return plain


def prebuilt_config(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says, given that of the plain model and `OffloadConfig.recipe` of how it was quantized."""
    return {key: value for key, value in config.items() if key != "transformers_weights"} | {
        "auto_map": {name: f"{GUARD.stem}.{name}" for name in AUTO_CLASSES},
        "quantization_config": dict(recipe),
    }
