"""Find every expert in the checkpoint files, without reading any.

While loading, Transformers renames checkpoint keys and merges, splits or transposes their tensors
(`core_model_loading.py`, 5.23: `rename_source_key`, `WeightConverter`). We replay the renaming on the names to learn
which stored tensors make up each parameter, and keep the conversion to run it on one expert at a time.
"""

# E experts of a module

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import CheckpointError, UnsupportedModelError
from transformers_moe_offload.hf.layouts import ExpertField
from transformers_moe_offload.hf.upstream import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers_moe_offload.store.field_source import Assemble, FieldSource
from transformers_moe_offload.tensor_files.index import StoredTensor


@dataclass
class ParameterSource:
    """The stored tensors that make up one parameter, keyed by the pattern of the conversion that they match."""

    converter: WeightConverter | None
    """None where the parameter is stored as it is."""
    stored: dict[str, list[StoredTensor]] = field(default_factory=dict)


def trace_parameters(
    model: Any, parameters: Mapping[str, Tensor], conversions: Sequence[Any], stored: Mapping[str, StoredTensor]
) -> dict[str, ParameterSource]:
    """The source of every parameter that the checkpoint fills: name in the model -> source.

    `parameters` are all parameters of the model, on meta, before experts were taken out. If one conversion yields
    several parameters, all of them are listed.
    """
    renamings, converters, by_pattern = _split(conversions)
    prefix = model.base_model_prefix
    sources: dict[str, ParameterSource] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = rename_source_key(key, [], [], prefix, parameters)
        if name not in parameters:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        source = sources.setdefault(name, ParameterSource(converter))
        source.stored.setdefault(pattern or key, []).append(stored[key])
        for target in _targets(name, converter):
            sources.setdefault(target, source)
    return sources


def names_without_experts(
    model: Any, remaining: Mapping[str, Tensor], conversions: Sequence[Any], keys: Iterable[str]
) -> set[str]:
    """The names under which Transformers will report these checkpoint keys as unexpected.

    It checks whether a key belongs to the model before it chooses a prefix, and reports every parameter that the key's
    conversion would have filled; `remaining` are the model's parameters without the experts.
    """
    renamings, converters, by_pattern = _split(conversions)
    names = set()
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, remaining)
        names |= set(_targets(name, by_pattern[pattern] if pattern is not None else None))
    return names


def expert_sources(
    name: str, source: ParameterSource, field: ExpertField, casts: tuple[str, ...], config: Any
) -> list[FieldSource]:
    """The source of each entry of a stacked parameter, which the model calls `name`.

    Raises `CheckpointError` if the checkpoint does not hold all entries.
    """
    assert field.num_entries is not None
    pieces = [_pieces_of(name, source, entry, field.num_entries) for entry in range(field.num_entries)]
    assemble = None
    if not _is_concatenation(source):
        assemble = _assemble_with(name, source, pieces[0], field.shape, casts[-1], config)
    found = [FieldSource(tuple(chain(*by_pattern.values())), casts, assemble) for by_pattern in pieces]
    return [_checked(f"{name}[{expert}]", one, field.shape) for expert, one in enumerate(found)]


def assembled(name: str, source: ParameterSource, field: ExpertField, expert: int, dtype: str, config: Any) -> Tensor:
    """One entry of a stacked parameter whose pieces are tensors in memory."""
    assert field.num_entries is not None
    if source.converter is None:
        ((stack,),) = source.stored.values()
        return stack[expert]  # type: ignore[index]
    pieces: dict[str, list[Any]] = {}
    for pattern in source.converter.source_patterns:
        for_all = source.stored.get(pattern, [])
        if len(for_all) == 1:
            pieces[pattern] = [for_all[0][expert : expert + 1]]  # type: ignore[index]
        elif for_all:
            pieces[pattern] = for_all[expert :: field.num_entries]
    return _assemble_with(name, source, pieces, field.shape, dtype, config)(list(chain(*pieces.values())))


def whole_source(name: str, source: ParameterSource, shape: tuple[int, ...], casts: tuple[str, ...]) -> FieldSource:
    """The source of a parameter that belongs to a single expert."""
    if source.converter is not None:
        raise UnsupportedModelError(
            f"{name} is converted while it is loaded ({source.converter}), which is not supported for experts that are "
            f"modules of their own"
        )
    return _checked(name, FieldSource(tuple(chain(*source.stored.values())), casts), shape)


def _split(conversions: Sequence[Any]) -> tuple[list[Any], list[Any], dict[str, WeightConverter]]:
    """Renamings, converters, and converters by source pattern, as in the loader; copies, because they keep state."""
    conversions = deepcopy(list(conversions))
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    return renamings, converters, {pattern: c for c in converters for pattern in c.source_patterns}


def _targets(name: str, converter: WeightConverter | None) -> list[str]:
    """All parameters that a conversion fills, given the name of the first."""
    if converter is None:
        return [name]
    first = converter.target_patterns[0]
    return [name.replace(first, target) for target in converter.target_patterns]


def _pieces_of(name: str, source: ParameterSource, expert: int, num_entries: int) -> dict[str, list[StoredTensor]]:
    """The stored pieces of one expert, by pattern, in the order of the conversion's patterns."""
    patterns = list(source.stored)
    if source.converter is not None:
        patterns = [pattern for pattern in source.converter.source_patterns if pattern in source.stored]
    return {pattern: _pick(name, source.stored[pattern], expert, num_entries) for pattern in patterns}


def _pick(name: str, stored: list[StoredTensor], expert: int, num_entries: int) -> list[StoredTensor]:
    if len(stored) % num_entries == 0:
        # One tensor an expert; a conversion with several targets (ernie4_5_vl_moe: text and vision experts) takes
        # the experts of all of them, one target after the other.
        return stored[expert::num_entries]
    if len(stored) == 1 and stored[0].shape and stored[0].shape[0] % num_entries == 0:
        return [stored[0].row(expert, num_entries)]
    found = ", ".join(tensor.name for tensor in stored[:3])
    raise CheckpointError(
        f"the checkpoint holds {len(stored)} tensors for {name}, but the model has {num_entries} experts "
        f"(found {found}, ...); the checkpoint is incomplete or belongs to another model"
    )


def _is_concatenation(source: ParameterSource) -> bool:
    """Whether one expert's pieces, concatenated in memory, are its entry of the parameter."""
    if source.converter is None:
        return True
    operations = source.converter.operations
    return len(source.converter.target_patterns) == 1 and all(
        (isinstance(operation, MergeModulelist) and operation.dim == 0)
        or (isinstance(operation, Concatenate) and operation.dim == 1 and len(operations) > 1)
        or (isinstance(operation, Concatenate) and operation.dim == 1 and _has_only_rows(source))
        for operation in operations
    )


def _has_only_rows(source: ParameterSource) -> bool:
    """Whether the stored tensors are stacks of matrices, whose concatenation along dim 1 appends rows."""
    return all(len(tensor.shape) == 3 for tensors in source.stored.values() for tensor in tensors)


def _assemble_with(
    name: str,
    source: ParameterSource,
    pieces: Mapping[str, list[StoredTensor]],
    shape: tuple[int, ...],
    dtype: str,
    config: Any,
) -> Assemble:
    """Run Transformers' own conversion on one expert's pieces."""
    converter = source.converter
    assert converter is not None
    counts = {pattern: len(tensors) for pattern, tensors in pieces.items()}
    # Operations may ask the model for the shape and dtype of a parameter; this substitute has one expert.
    one_expert = torch.empty((1, *shape), dtype=torch_dtype(dtype), device="meta")
    module = SimpleNamespace(**{name.rpartition(".")[2]: one_expert})
    model = SimpleNamespace(config=config, get_parameter=lambda _: one_expert, get_submodule=lambda _: module)

    def assemble(tensors: list[Tensor]) -> Tensor:
        remaining = iter(tensors)
        conversion = copy(converter)
        conversion.collected_tensors = {
            pattern: [next(remaining) for _ in range(count)] for pattern, count in counts.items()
        }
        converted: dict[str, Any] = conversion.convert(name, model=model, config=config)
        out = converted[name] if name in converted else next(iter(converted.values()))
        tensor: Tensor = out[0] if isinstance(out, list) else out
        return tensor

    return assemble


def _checked(name: str, source: FieldSource, shape: tuple[int, ...]) -> FieldSource:
    found = sum(math.prod(piece.shape) for piece in source.pieces)
    if source.assemble is None and found != math.prod(shape):
        raise CheckpointError(
            f"the checkpoint holds {found:,} values for {name}, but the model expects {list(shape)} = "
            f"{math.prod(shape):,}; the config does not belong to these weights"
        )
    return source
