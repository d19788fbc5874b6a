"""The checkpoint a model is loaded from, and where its experts are in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertSpec, FieldSpec
from transformers_moe_offload.hf.layer import SparseLayer
from transformers_moe_offload.hf.layouts import ExpertField
from transformers_moe_offload.hf.locate import expert_sources, trace_parameters, whole_source
from transformers_moe_offload.memory.checkpoint import FieldSource, LayerSource
from transformers_moe_offload.memory.record import dtype_name
from transformers_moe_offload.memory.safetensors_index import StoredTensor, check_index_file, read_index


@dataclass(frozen=True)
class Checkpoint:
    """Files, checked, and what Transformers has decided about loading them."""

    tensors: Mapping[str, StoredTensor]
    parameters: Mapping[str, Tensor]
    """All of the model's parameters and buffers, on meta, with the experts still in."""
    dtype: torch.dtype
    dtype_plan: Mapping[str, torch.dtype]
    """Patterns of parameters that keep a dtype of their own."""

    @classmethod
    def open(
        cls,
        files: Sequence[Path],
        parameters: Mapping[str, Tensor],
        dtype: torch.dtype,
        dtype_plan: Mapping[str, torch.dtype] | None,
    ) -> Checkpoint:
        """Read the headers of the files and check them against each other and the index file."""
        tensors = read_index(files)
        names = {file.name for file in files}
        for index_path in sorted(files[0].parent.glob("*.safetensors.index.json")):
            if len(names) > 1 or index_path.name.startswith(files[0].stem):
                check_index_file(index_path, tensors)
        return cls(tensors, parameters, dtype, dtype_plan or {})

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which Transformers would load a parameter (`convert_and_load_state_dict_in_model`, 5.23)."""
        for pattern, dtype in self.dtype_plan.items():
            if re.search(pattern.replace("*", r".*"), name):
                return dtype
        return self.parameters[name].dtype


def locate(model: Any, layers: Sequence[SparseLayer], checkpoint: Checkpoint, conversions: Sequence[Any]) -> list[LayerSource]:
    """Where the experts of every sparse layer are."""
    traced = trace_parameters(model, checkpoint.parameters, conversions, checkpoint.tensors)
    sources = []
    for layer in layers:
        fields, by_field = [], []
        for field in layer.fields:
            dtype = checkpoint.dtype_of(f"{layer.name}.{field.paths[0]}")
            fields.append(FieldSpec(field.name, field.shape, dtype_name(dtype)))
            by_field.append(_field_sources(layer, field, dtype, traced, model.config))
        spec = ExpertSpec(layer.index, layer.name, layer.num_experts, tuple(fields))
        sources.append(LayerSource(spec, tuple(zip(*by_field, strict=True))))
    return sources


def _field_sources(
    layer: SparseLayer, field: ExpertField, dtype: torch.dtype, traced: Mapping[str, Any], config: Any
) -> list[FieldSource]:
    casts = (dtype_name(dtype),)
    names = [f"{layer.name}.{path}" for path in field.paths]
    for name in names:
        if name not in traced:
            raise CheckpointError(
                f"the checkpoint holds nothing for {name}; it is incomplete or belongs to another model"
            )
    if field.is_stacked:
        return expert_sources(names[0], traced[names[0]], layer.num_experts, field.shape, casts, config)
    return [whole_source(name, traced[name], field.shape, casts) for name in names]
