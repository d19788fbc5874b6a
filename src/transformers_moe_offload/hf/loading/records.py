"""Locate the experts of a checkpoint that stores them as records: one or two stacks of rows for each sparse layer.

`PATH.records` is uint8 (E, row bytes), where PATH is the path of the experts module. If some experts are hot,
`PATH.records` holds only the others, and `PATH.hot_records` the hot ones, with rows of their own size; each stack is in
the order of the experts. `PATH.checksums`, int64, has one entry per expert, for both stacks. The metadata of the file
lists the fields of a record under the name of the stack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers_moe_offload.config import ExpertFormats
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ITEMSIZE, ExpertSpec, FieldSpec
from transformers_moe_offload.hf.loading.checkpoint import Checkpoint
from transformers_moe_offload.hf.loading.codecs import codecs_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.store.layer_source import LayerSource, RecordedExpert
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.tensor_files.index import StoredTensor, read_metadata
from transformers_moe_offload.tensor_files.reading import read_stored
from transformers_moe_offload.untrusted import parse_json

RECORDS, HOT_RECORDS, CHECKSUMS = "records", "hot_records", "checksums"


@dataclass(frozen=True)
class Stack:
    """The records of experts with one codec."""

    tensor: FieldSpec
    """uint8 (experts, row bytes)."""
    fields: tuple[FieldSpec, ...]
    """The fields of a record."""

    @classmethod
    def of(cls, name: str, num_experts: int, fields: tuple[FieldSpec, ...]) -> Stack:
        """The stack `name` of `num_experts` experts with these fields."""
        return cls(FieldSpec(name, (num_experts, RecordLayout(fields).row_bytes), "uint8"), fields)

    @property
    def row_bytes(self) -> int:
        """Bytes from one record to the next."""
        return self.tensor.shape[1]


def locate_records(
    model: Any, layers: Sequence[SparseLayer], checkpoint: Checkpoint, formats: ExpertFormats
) -> list[LayerSource]:
    """Where the experts of every sparse layer are, in a checkpoint that was quantized with these formats."""
    formats.check([layer.num_experts for layer in layers])
    return [_locate(model, layer, checkpoint, formats) for layer in layers]


def record_keys(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The names of all stacks of records and of their checksums."""
    return [name for name in tensors if name.rpartition(".")[2] in (RECORDS, HOT_RECORDS, CHECKSUMS)]


def described(fields: Sequence[FieldSpec]) -> str:
    """The fields of a record in the form of a file's metadata, JSON."""
    return json.dumps([[field.name, list(field.shape), field.dtype] for field in fields])


def _locate(model: Any, layer: SparseLayer, checkpoint: Checkpoint, formats: ExpertFormats) -> LayerSource:
    path = _stored_path(model, layer, checkpoint.tensors)
    names = [f"{layer.name}.{field.paths[0]}" for field in layer.fields]
    loaded = [
        FieldSpec(field.name, field.shape, dtype_name(checkpoint.dtype_of(name)))
        for field, name in zip(layer.fields, names, strict=True)
    ]
    held = {name: _fields_of(tensor) for name, tensor in _stacks(path, checkpoint.tensors).items()}
    stored = {field.name: field.dtype for fields in held.values() for field in fields}
    plain = tuple(field.cast(stored.get(field.name, field.dtype)) for field in loaded)
    codecs = codecs_of(model, layer, plain, formats)
    rows: dict[int, StoredTensor] = {}
    for name, codec, is_hot in zip((RECORDS, HOT_RECORDS), codecs.kinds, (False, True), strict=False):
        assert codec is not None
        experts = [expert for expert in range(layer.num_experts) if (expert in codecs.hot_experts) == is_hot]
        stack = Stack.of(f"{path}.{name}", len(experts), codec.stored)
        rows |= dict(zip(experts, _rows(stack, len(experts), checkpoint.tensors, held), strict=True))
    sums = _checksums(path, layer.num_experts, checkpoint.tensors)
    spec = ExpertSpec(layer.index, layer.name, layer.num_experts, plain)
    stored_experts = tuple(RecordedExpert(rows[expert], sums[expert]) for expert in range(layer.num_experts))
    return LayerSource(spec, stored_experts, codecs=codecs).cast(loaded[0].dtype)


def _rows(
    stack: Stack, count: int, tensors: Mapping[str, StoredTensor], held: Mapping[str, tuple[FieldSpec, ...]]
) -> list[StoredTensor]:
    """The rows of a stack; raises `CheckpointError` if it is missing, or differs in fields, dtype or shape."""
    wanted = stack.tensor
    if wanted.name not in tensors:
        raise CheckpointError(f"the checkpoint has no {wanted.name}, the records of {count} experts; it is incomplete")
    found = tensors[wanted.name]
    if stack.fields != held[wanted.name]:
        raise CheckpointError(
            f"{found.file.path} holds records of {described(held[wanted.name])} in {wanted.name}, but the config of "
            f"the checkpoint makes them {described(stack.fields)}; its files do not belong together"
        )
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        raise CheckpointError(
            f"{found.file.path} has {wanted.name} of shape {list(found.shape)}, but {count} experts of this model take "
            f"{list(wanted.shape)}; its files do not belong together"
        )
    return [replace(row, shape=row.shape[1:]) for row in (found.row(number, count) for number in range(count))]


def _stacks(path: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    names = [f"{path}.{kind}" for kind in (RECORDS, HOT_RECORDS)]
    return {name: tensors[name] for name in names if name in tensors}


def _stored_path(model: Any, layer: SparseLayer, tensors: Mapping[str, StoredTensor]) -> str:
    """The layer's path in the saved model, which may be the base model of this one, or have this one as its base."""
    prefix = f"{model.base_model_prefix}."
    for path in (layer.name, f"{prefix}{layer.name}", layer.name.removeprefix(prefix)):
        if f"{path}.{RECORDS}" in tensors:
            return path
    raise CheckpointError(
        f"the checkpoint has no records of experts for {layer.name}; it is incomplete or belongs to another model"
    )


def _fields_of(stack: StoredTensor) -> tuple[FieldSpec, ...]:
    try:
        described = parse_json(read_metadata(stack.file.path)[stack.name], stack.name)
        fields = tuple(FieldSpec(name, tuple(shape), dtype) for name, shape, dtype in described)
        sizes = [size for field in fields for size in field.shape]
        is_known = all(field.dtype in ITEMSIZE for field in fields) and all(type(size) is int for size in sizes)
    except (KeyError, ValueError, TypeError, CheckpointError):
        is_known = False
    if not is_known:
        raise CheckpointError(
            f"{stack.file.path} does not say what the records in {stack.name} are made of; quantize the original again"
        )
    return fields


def _checksums(path: str, num_experts: int, tensors: Mapping[str, StoredTensor]) -> list[int] | list[None]:
    """The checksum of every expert's record, by expert; None where the checkpoint has none."""
    found = tensors.get(f"{path}.{CHECKSUMS}")
    if found is None:
        return [None] * num_experts
    if (found.dtype, found.shape) != ("int64", (num_experts,)):
        raise CheckpointError(
            f"{found.file.path} has {found.name} in {found.dtype} of shape {list(found.shape)}, but {num_experts} "
            f"experts have as many checksums in int64; its files do not belong together"
        )
    sums: list[int] = read_stored(found).tolist()
    return sums
