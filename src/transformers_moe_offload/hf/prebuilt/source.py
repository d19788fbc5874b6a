"""Read a checkpoint, expert by expert and dense tensor by tensor, to write a prebuilt one from it.

At most one expert, or the tensors of one conversion, is read at a time, and the model is never built with weights.
Weights that another method has quantized are decoded by that method's own code (`hf/other_quantizers/dequantize.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.config import ExpertFormats, HqqFormat, OffloadConfig
from transformers_moe_offload.dtypes import dtype_name, torch_dtype
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.formats.hqq import packing_of, quantize
from transformers_moe_offload.hf.layouts.base import parameter
from transformers_moe_offload.hf.loading.checkpoint import Checkpoint, locate
from transformers_moe_offload.hf.loading.codecs import codecs_of, plain_fields
from transformers_moe_offload.hf.loading.locate import ParameterSource, trace_parameters
from transformers_moe_offload.hf.model.dense import dense_formats
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.other_quantizers.dequantize import Opener, StoredBytes
from transformers_moe_offload.hf.other_quantizers.keep_encoded import as_stored
from transformers_moe_offload.hf.prebuilt.layout import LayerContent
from transformers_moe_offload.hf.upstream import (
    dtype_plan,
    get_model_conversion_mapping,
    ignored_on_load_missing,
    ignored_on_save,
    tied_weights,
)
from transformers_moe_offload.hub.fetch import Fetched
from transformers_moe_offload.output.shards import Content
from transformers_moe_offload.store.encoding import encoded_row
from transformers_moe_offload.store.field_source import FieldSource
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.tensor_files.index import StoredTensor


@dataclass(frozen=True)
class Quantization:
    """A model on meta, its experts taken out, and how to quantize it; checked before any weight is read."""

    model: Any
    layers: Sequence[SparseLayer]
    codecs: Sequence[LayerCodecs]
    """How to store the experts of each layer."""
    packed: Mapping[str, HqqFormat]
    """Name -> format of the dense weights that are quantized."""
    checkpoint: Checkpoint
    """The parameters and dtypes with which Transformers would load the plain model; without files yet."""
    opener: Opener | None = None
    """Decodes weights that another method has quantized; None for a plain checkpoint."""

    @classmethod
    def of(cls, model: Any, config: OffloadConfig, dtype: torch.dtype, opener: Opener | None = None) -> Quantization:
        """How to quantize a model on meta, of this dtype, as a config says; `opener` decodes its weights.

        Raises `ConfigError` if a group size does not divide a matrix of experts, when the message lists sizes that do,
        or if another format fits nothing.
        """
        layers = [layer_of(module) for module in model.modules() if isinstance(module, OffloadedExperts)]
        formats = config.formats or ExpertFormats()
        formats.check([layer.num_experts for layer in layers])
        packed = {f"{name}.weight": format for name, format in dense_formats(model, layers, config).items()}
        codecs = [codecs_of(model, layer, plain_fields(layer), formats) for layer in layers]
        return cls(model, layers, codecs, packed, _undecided(model, layers, dtype), opener)

    @property
    def left_as(self) -> str:
        """A description of experts without a format, for the model card."""
        return "as in the original" if self.opener is None else f"opened from {self.opener.name}"

    @property
    def dense_left_as(self) -> str:
        """A description of the dense part without a format, for the model card."""
        return self.left_as if self.opener is None or self.opener.is_for_dense else "as in the original"

    @cached_property
    def conversions(self) -> list[Any]:
        """The conversions that turn the checkpoint's tensors into the model's."""
        return get_model_conversion_mapping(self.model) if self.opener is None else self.opener.conversions(self.model)

    def located(self, tensors: Mapping[str, StoredTensor]) -> list[LayerSource]:
        """The sources of experts among the tensors of a checkpoint; those of another method in their stored form."""
        checkpoint = replace(self.checkpoint, tensors=tensors)
        sources = locate(self.model, self.layers, checkpoint, self.conversions)
        return sources if self.opener is None else [as_stored(source) for source in sources]

    def stored_bytes(self, tensors: Mapping[str, StoredTensor]) -> StoredBytes:
        """Bytes of the checkpoint's weights as they are stored."""
        return StoredBytes.of(self.located(tensors), tensors)

    def parts_of(self, name: str) -> tuple[FieldSpec, ...]:
        """The arrays that are stored for a dense tensor."""
        shape = tuple(self.checkpoint.parameters[name].shape)
        if name not in self.packed:
            return (FieldSpec(name, shape, dtype_name(self.checkpoint.dtype_of(name))),)
        rows, cols = shape
        packing = packing_of(rows, cols, self.packed[name])
        return tuple(FieldSpec(f"{name}_{part.name}", part.shape, part.dtype) for part in packing.parts)

    @property
    def bytes_saved(self) -> int:
        """How much smaller the dense weights get by being quantized."""
        whole = sum(
            self.checkpoint.parameters[name].numel() * self.checkpoint.dtype_of(name).itemsize for name in self.packed
        )
        return whole - sum(part.nbytes for name in self.packed for part in self.parts_of(name))

    def saved_names(self) -> dict[str, list[str]]:
        """Name of each dense tensor that is stored -> all its names; tied weights are stored once."""
        by_tensor: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name not in ignored_on_save(self.model):
                by_tensor.setdefault(id(tensor), []).append(name)
        saved: dict[str, list[str]] = {}
        for names in by_tensor.values():
            saved[next((name for name in names if name not in tied_weights(self.model)), names[0])] = names
        return saved

    def encode(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Quantize a dense tensor, if it is to be: name -> the arrays of `parts_of`."""
        if name not in self.packed:
            return {name: tensor}
        matrix = quantize(tensor, self.packed[name], name=name)
        return {f"{name}_{part}": array for part, array in matrix.parts.items()}


def contents(quantization: Quantization, fetched: Fetched) -> tuple[list[LayerContent], list[Content]]:
    """The content to write: sparse layers and dense tensors, from the files of the checkpoint."""
    model, undecided = quantization.model, quantization.checkpoint
    checkpoint = Checkpoint.open(
        fetched.weights, folder=fetched.folder, parameters=undecided.parameters, dtype_plan=undecided.dtype_plan
    )
    sources = quantization.located(checkpoint.tensors)
    layers = [
        LayerContent.coded(source.spec.name, source.spec.num_experts, codecs, partial(encoded_row, source, codecs))
        for source, codecs in zip(sources, quantization.codecs, strict=True)
    ]
    traced = trace_parameters(model, checkpoint.parameters, quantization.conversions, checkpoint.tensors)
    return layers, list(_dense_contents(quantization, checkpoint, traced))


def _undecided(model: Any, layers: Sequence[SparseLayer], dtype: torch.dtype) -> Checkpoint:
    experts = {
        f"{layer.name}.{path}": parameter(model.get_submodule(layer.name), path)
        for layer in layers
        for field in layer.fields
        for path in field.paths
    }
    return Checkpoint({}, parameters=experts | model.state_dict(), dtype_plan=dtype_plan(model, dtype))


def _dense_contents(
    quantization: Quantization, checkpoint: Checkpoint, traced: Mapping[str, ParameterSource]
) -> Iterator[Content]:
    """All tensors except the experts'; the results of one conversion form one content."""
    leaders: dict[int, str] = {}
    for name, source in traced.items():
        leaders.setdefault(id(source), name)
    groups: dict[int, dict[str, str]] = {}
    for name, aliases in quantization.saved_names().items():
        found = next((alias for alias in (name, *aliases) if alias in traced), None)
        if found is not None:
            groups.setdefault(id(traced[found]), {})[found] = name
        elif not _may_be_missing(quantization.model, name):
            raise CheckpointError(
                f"the checkpoint holds nothing for {name}; it is incomplete or belongs to another model"
            )
    for source_id, names in groups.items():
        leader = leaders[source_id]
        parts = tuple(part for name in names.values() for part in quantization.parts_of(name))
        dtype = dtype_name(checkpoint.dtype_of(leader))
        yield Content(parts, partial(_read, quantization, leader, traced[leader], dtype, names))


def _may_be_missing(model: Any, name: str) -> bool:
    """Whether Transformers can load a checkpoint without this tensor."""
    patterns = ignored_on_load_missing(model)
    return name in dict(model.named_buffers()) or any(re.search(pattern, name) for pattern in patterns)


def _read(
    quantization: Quantization, leader: str, source: ParameterSource, dtype: str, names: Mapping[str, str]
) -> dict[str, Tensor]:
    """Run one conversion and quantize its results; `names`: name in the model -> name to save it under."""
    made = _convert(quantization, leader, source, dtype)
    arrays: dict[str, Tensor] = {}
    expected = quantization.checkpoint.parameters
    for found, name in names.items():
        if found not in made or made[found].shape != expected[name].shape:
            shape = list(made[found].shape) if found in made else "nothing"
            raise CheckpointError(
                f"the checkpoint holds {shape} for {found}, but the model expects {list(expected[name].shape)}; the "
                f"config does not belong to these weights"
            )
        dtype_in_model = quantization.checkpoint.dtype_of(name)
        bare = _without_scales(source, made[found].dtype)
        if bare is not None and dtype_in_model.itemsize > 1:
            raise CheckpointError(
                f"the checkpoint holds {found} in {dtype_name(bare)}, and no scales to make "
                f"{dtype_name(dtype_in_model)} of it; it is incomplete: download it again"
            )
        arrays |= quantization.encode(name, made[found].to(dtype_in_model))
    return arrays


def _without_scales(source: ParameterSource, dtype: torch.dtype) -> torch.dtype | None:
    """The one-byte dtype of a parameter that is stored without scales; None for another dtype, or with scales.

    `dtype` is the dtype that Transformers converts such a weight to: the stored one in 5.23, another after a cast in
    5.24.
    """
    if dtype.itemsize == 1:
        return dtype
    stored = [tensor for many in source.stored.values() for tensor in many]
    kinds = {torch_dtype(tensor.dtype) for tensor in stored}
    if len(source.stored) == 1 and all(kind.itemsize == 1 and kind.is_floating_point for kind in kinds):
        return kinds.pop()
    return None


def _convert(quantization: Quantization, leader: str, source: ParameterSource, dtype: str) -> dict[str, Tensor]:
    """The parameters that a conversion yields, as in Transformers; `leader` is the first of them."""
    model, opener = quantization.model, quantization.opener

    def read(stored: StoredTensor) -> Tensor:
        cast = dtype if opener is None else opener.dtype_of(stored, source.converter, dtype)
        return FieldSource((stored,), (cast,)).read(stored.shape)

    tensors = {pattern: [read(one) for one in stored] for pattern, stored in source.stored.items()}
    if source.converter is None:
        ((tensor,),) = tensors.values()
        return {leader: tensor}
    conversion = deepcopy(source.converter)
    for pattern in conversion.source_patterns:
        if pattern in tensors:
            conversion.collected_tensors[pattern] = tensors.pop(pattern)
    with torch.no_grad():
        converted: dict[str, Any] = conversion.convert(leader, model=model, config=model.config)
    return {name: out[0] if isinstance(out, list) else out for name, out in converted.items()}
