"""The checkpoint that a model is loaded from, and where its experts are in the files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertSpec, FieldSpec
from transformers_moe_offload.hf.loading.locate import (
    ParameterSource,
    expert_sources,
    names_without_experts,
    trace_parameters,
    whole_source,
)
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.other_quantizers.methods import refuse_hqq
from transformers_moe_offload.hf.upstream import ignore_on_load_unexpected, tied_weights
from transformers_moe_offload.store.layer_source import LayerSource, ScatteredExpert
from transformers_moe_offload.tensor_files.index import StoredTensor, check_index_file, read_header, read_index


@dataclass(frozen=True)
class Checkpoint:
    """The tensors in checked files, and the parameters and dtypes that Transformers loads them into."""

    tensors: Mapping[str, StoredTensor]
    parameters: Mapping[str, Tensor]
    """All parameters and buffers of the model, on meta, including the experts."""
    dtype_plan: Mapping[str, torch.dtype]
    """Patterns of parameters that keep a dtype of their own."""

    @classmethod
    def open(
        cls,
        files: Sequence[Path],
        *,
        folder: Path,
        parameters: Mapping[str, Tensor],
        dtype_plan: Mapping[str, torch.dtype],
    ) -> Checkpoint:
        """Read the headers of the files and check them against each other and the index file.

        `folder` is the path or id that the model is loaded from; if it is a folder, all files must be inside it.
        """
        if folder.is_dir():
            _refuse_outside(folder, files)
        # Check for hqq before reading the index: files of that format repeat tensor names, which is an error there.
        refuse_hqq((tensor.name for tensor in read_header(files[0])), folder)
        tensors = read_index(files)
        refuse_hqq(tensors, folder)
        if len(files) > 1:
            for index_path in sorted(Path(os.path.commonpath(files)).glob("*.safetensors.index*.json")):
                if not _is_of_other_files(index_path, files):
                    check_index_file(index_path, tensors)
        return cls(tensors, parameters, dtype_plan)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which Transformers would load a parameter (`convert_and_load_state_dict_in_model`, 5.23)."""
        for pattern, dtype in self.dtype_plan.items():
            if re.search(pattern.replace("*", r".*"), name):
                return dtype
        return self.parameters[name].dtype


def _refuse_outside(folder: Path, files: Sequence[Path]) -> None:
    """Raise for files outside the folder: file names come from an untrusted index. Links are allowed: the Hub's cache
    consists of them."""
    root = os.path.abspath(folder)
    for file in files:
        if os.path.commonpath([root, os.path.abspath(file)]) != root:
            raise CheckpointError(f"the checkpoint's index names {file}; refusing to read outside of {folder}")


def _is_of_other_files(index_path: Path, files: Sequence[Path]) -> bool:
    """Whether an index names none of these files: it belongs to another variant in the same folder."""
    try:
        shards = set(json.loads(index_path.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # `check_index_file` reports the fault
    return (
        bool(shards)
        and all(isinstance(shard, str) for shard in shards)
        and {index_path.parent / shard for shard in shards}.isdisjoint(files)
    )


def locate(
    model: Any, layers: Sequence[SparseLayer], checkpoint: Checkpoint, conversions: Sequence[Any]
) -> list[LayerSource]:
    """Where the experts of every sparse layer are stored."""
    read = cache(lambda path: read_index([path]))
    traced = trace_parameters(model, checkpoint.parameters, conversions, checkpoint.tensors)
    sources = []
    for layer in layers:
        module = model.get_submodule(layer.name)
        dtype = dtype_name(checkpoint.dtype_of(f"{layer.name}.{layer.fields[0].paths[0]}"))
        elsewhere = layer.layout.own_sources(module, dtype, read)
        if elsewhere is not None:
            own = tuple(FieldSpec(field.name, field.shape, dtype) for field in layer.fields)
            spec = ExpertSpec(layer.index, layer.name, layer.num_experts, own)
            sources.append(LayerSource(spec, elsewhere))
            continue
        fields, by_field = [], {}
        for field in layer.fields:
            names = [f"{layer.name}.{path}" for path in field.paths]
            dtype = dtype_name(checkpoint.dtype_of(names[0]))
            found = [_source_of(model, name, traced) for name in names]
            fields.append(FieldSpec(field.name, field.shape, dtype))
            if field.is_stacked:
                by_field[field.name] = expert_sources(names[0], found[0], field, (dtype,), model.config)
            else:
                by_field[field.name] = [
                    whole_source(name, source, field.shape, (dtype,)) for name, source in zip(names, found, strict=True)
                ]
        spec = ExpertSpec(layer.index, layer.name, layer.num_experts, tuple(fields))
        by_expert = zip(*(entries[: layer.num_experts] for entries in by_field.values()), strict=True)
        experts = tuple(ScatteredExpert(entries) for entries in by_expert)
        spare = {name: tuple(entries[layer.num_experts :]) for name, entries in by_field.items()}
        sources.append(LayerSource(spec, experts, {name: rest for name, rest in spare.items() if rest}))
    pieces = (piece for source in sources for expert in source.experts for piece in expert.pieces)
    unused = (piece for source in sources for fields in source.spare.values() for one in fields for piece in one.pieces)
    expect_unused(model, {piece.name for piece in chain(pieces, unused)}, conversions)
    return sources


def _source_of(model: Any, name: str, traced: Mapping[str, ParameterSource]) -> ParameterSource:
    tied = tied_weights(model)
    for stored_name in (name, tied.get(name, name), *(other for other, source in tied.items() if source == name)):
        if stored_name in traced:
            return traced[stored_name]
    raise CheckpointError(f"the checkpoint holds nothing for {name}; it is incomplete or belongs to another model")


def expect_unused(model: Any, keys: Iterable[str], conversions: Sequence[Any]) -> None:
    """Tell Transformers not to report expert tensors, given by their keys in the checkpoint, as unexpected."""
    unused = names_without_experts(model, model.state_dict(), conversions, keys)
    ignore_on_load_unexpected(model, unused)
