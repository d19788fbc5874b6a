"""Locate the experts of a checkpoint that holds them as records: one stack of rows for each sparse layer.

`PATH.records` is uint8 (E, row bytes), where PATH is the experts module's, and `PATH.checksums` int64 (E,). What the
fields of a record are is in the metadata of the file, under the name of the stack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers_moe_offload.config import ExpertFormats
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertSpec, FieldSpec
from transformers_moe_offload.formats.coding import LayerCoding
from transformers_moe_offload.hf.checkpoint import Checkpoint
from transformers_moe_offload.hf.layer import SparseLayer
from transformers_moe_offload.memory.checkpoint import LayerSource
from transformers_moe_offload.memory.expert_source import recorded_experts
from transformers_moe_offload.memory.field_source import read_stored
from transformers_moe_offload.memory.record import RecordLayout, dtype_name
from transformers_moe_offload.memory.safetensors_index import StoredTensor, read_metadata

RECORDS, CHECKSUMS = "records", "checksums"


def locate_records(
    model: Any, layers: Sequence[SparseLayer], checkpoint: Checkpoint, formats: ExpertFormats
) -> list[LayerSource]:
    """Where the experts of every sparse layer are, in a checkpoint that was quantized with these formats."""
    formats.check(len(layers))
    return [_locate(model, layer, checkpoint, formats) for layer in layers]


def record_keys(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The names of all stacks of records and of their checksums."""
    return [name for name in tensors if name.rpartition(".")[2] in (RECORDS, CHECKSUMS)]


def described(fields: Sequence[FieldSpec]) -> str:
    """The fields of a record as the metadata of a file has them."""
    return json.dumps([[field.name, list(field.shape), field.dtype] for field in fields])


def _locate(model: Any, layer: SparseLayer, checkpoint: Checkpoint, formats: ExpertFormats) -> LayerSource:
    path = _stored_path(model, layer, checkpoint.tensors)
    stack, checksums = checkpoint.tensors[f"{path}.{RECORDS}"], checkpoint.tensors.get(f"{path}.{CHECKSUMS}")
    held = _fields_of(stack)
    names = [f"{layer.name}.{field.paths[0]}" for field in layer.fields]
    loaded = [
        FieldSpec(field.name, field.shape, dtype_name(checkpoint.dtype_of(name)))
        for field, name in zip(layer.fields, names, strict=True)
    ]
    stored = {field.name: field.dtype for field in held}
    plain = tuple(field.cast(stored.get(field.name, field.dtype)) for field in loaded)
    transposed = layer.layout.is_transposed(model.get_submodule(layer.name))
    coding = LayerCoding(plain, formats.of_layer(layer.index), transposed)
    if coding.stored != held:
        raise CheckpointError(
            f"{stack.file.path} holds records of {described(held)} for {path}, but the config of the checkpoint makes "
            f"them {described(coding.stored)}; its files do not belong together"
        )
    expected = (layer.num_experts, RecordLayout(coding.stored).row_bytes)
    if stack.dtype != "uint8" or stack.shape != expected:
        raise CheckpointError(
            f"{stack.file.path} has {stack.name} of shape {list(stack.shape)}, but {layer.num_experts} experts of this "
            f"model take {list(expected)}; its files do not belong together"
        )
    sums = None if checksums is None else read_stored(checksums).tolist()
    spec = ExpertSpec(layer.index, layer.name, layer.num_experts, plain)
    source = LayerSource(spec, recorded_experts(stack, sums), coding=coding)
    return source.cast(loaded[0].dtype)


def _stored_path(model: Any, layer: SparseLayer, tensors: Mapping[str, StoredTensor]) -> str:
    """The layer's path in the model that was saved, which may have been this one's base, or built upon it."""
    prefix = f"{model.base_model_prefix}."
    for path in (layer.name, f"{prefix}{layer.name}", layer.name.removeprefix(prefix)):
        if f"{path}.{RECORDS}" in tensors:
            return path
    raise CheckpointError(
        f"the checkpoint has no records of experts for {layer.name}; it is incomplete or belongs to another model"
    )


def _fields_of(stack: StoredTensor) -> tuple[FieldSpec, ...]:
    try:
        fields = json.loads(read_metadata(stack.file.path)[stack.name])
        return tuple(FieldSpec(name, tuple(shape), dtype) for name, shape, dtype in fields)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{stack.file.path} does not say what the records in {stack.name} are made of; quantize the original again"
        ) from error
