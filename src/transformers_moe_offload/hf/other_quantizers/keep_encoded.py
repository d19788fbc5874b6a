"""Keep experts that another method has quantized in their stored form, with a function that decodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import CheckpointError, UnsupportedModelError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.formats.foreign import ForeignCodec, ForeignField
from transformers_moe_offload.store.field_source import FieldSource
from transformers_moe_offload.store.layer_source import LayerSource, ScatteredExpert

_PLAIN = {"float64", "float32", "bfloat16", "float16"}
"""Dtypes of unquantized weights."""


def as_stored(source: LayerSource) -> LayerSource:
    """The layer with its experts in their stored form: quantized fields become the arrays that store them.

    A layer without quantized fields is returned unchanged. Raises `CheckpointError` if the method cannot decode them.
    """
    by_field = list(zip(*(_fields(expert) for expert in source.experts), strict=True))
    if not any(_is_quantized(entries[0]) for entries in by_field):
        return source
    if source.spare:
        raise UnsupportedModelError(
            f"{source.spec.name} mixes quantized experts with trailing experts without weights, which is not "
            f"supported; use an unquantized checkpoint of the model"
        )
    fields = [
        _field(spec, entries, f"{source.spec.name}.{spec.name}")
        for spec, entries in zip(source.spec.fields, by_field, strict=True)
    ]
    stored = [
        [part for entry in (_parts(entry) if _is_quantized(entry) else [entry] for entry in entries) for part in entry]
        for entries in zip(*by_field, strict=True)
    ]
    experts = tuple(ScatteredExpert(tuple(entries)) for entries in stored)
    return replace(source, experts=experts, codecs=LayerCodecs(ForeignCodec(tuple(fields))))


def _fields(expert: object) -> tuple[FieldSource, ...]:
    assert isinstance(expert, ScatteredExpert)
    return expert.fields


def _is_quantized(entry: FieldSource) -> bool:
    return any(piece.dtype not in _PLAIN for piece in entry.pieces)


def _parts(entry: FieldSource) -> list[FieldSource]:
    """The arrays of a quantized field, each in its stored dtype."""
    return [FieldSource((piece,), (piece.dtype,)) for piece in entry.pieces]


def _field(spec: FieldSpec, entries: Sequence[FieldSource], name: str) -> ForeignField:
    """How a field is stored and decoded, given its source for each expert."""
    first = entries[0]
    if not _is_quantized(first):
        return ForeignField(spec, (spec,))
    kinds = [[(piece.shape, piece.dtype) for piece in entry.pieces] for entry in entries]
    for expert, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise CheckpointError(
                f"the checkpoint stores {name} of expert {expert} as {_described(entries[expert])}, but of expert 0 "
                f"as {_described(first)}; experts of one layer must be stored alike"
            )
    parts = tuple(FieldSpec(f"{spec.name}.{n}", shape, dtype) for n, (shape, dtype) in enumerate(kinds[0]))
    field = ForeignField(spec, parts, first.assemble)
    _expect_opens(field, first, name)
    return field


def _expect_opens(field: ForeignField, entry: FieldSource, name: str) -> None:
    """Decode the field once on meta, so that the method's own code checks whether the arrays belong together."""
    blank = [torch.empty(part.shape, dtype=torch_dtype(part.dtype), device="meta") for part in field.parts]
    try:
        opened = blank[0] if field.open is None else field.open(blank)
    except (ValueError, RuntimeError, AssertionError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"Transformers cannot open {name}, which the checkpoint stores as {_described(entry)}: {error}"
        ) from error
    if opened.dtype != torch_dtype(field.field.dtype) or opened.numel() != torch.Size(field.field.shape).numel():
        raise CheckpointError(
            f"the checkpoint stores {name} as {_described(entry)}, which opens to {opened.dtype} of shape "
            f"{list(opened.shape)}, but the model expects {field.field.dtype} of {list(field.field.shape)}; scales are "
            f"missing, or the config does not belong to these weights"
        )


def _described(entry: FieldSource) -> str:
    return ", ".join(f"{piece.name} ({piece.dtype} {list(piece.shape)})" for piece in entry.pieces)
