"""How one expert is stored: which of its fields are quantized, and what arrays each field becomes.

A record, a slot or a file holds these arrays like any other tensors, so no other code depends on the format.

Groups along the outputs of a matrix, hqq's axis 0, can be read, but not quantized. Such a group is g weights of one
column, N / g rows apart. With each group brought together, column after column, the weights form a (K, N) matrix whose
groups lie along its rows, as with axis 1; that matrix is packed.
"""

# N rows (outputs), K columns (inputs), S matrices stacked along the rows, g group size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from transformers_moe_offload.config.formats import HqqFormat
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import Codec
from transformers_moe_offload.formats.hqq import packing_of, quantize
from transformers_moe_offload.kernels.packed import PackedMatrix, Packing
from transformers_moe_offload.kernels.reference import dequantize

_STACKED = {"gate_up_proj": 2}
"""Fields that stack several matrices, each with groups of its own."""


def brought_together(weights: Tensor, group_size: int) -> Tensor:
    """weights (N, K), or their codes, of a single matrix -> (K, N), each group in one piece."""
    rows, cols = weights.shape
    return weights.reshape(group_size, rows // group_size, cols).permute(2, 1, 0).reshape(cols, rows)


def put_back(weights: Tensor, group_size: int, field: str) -> Tensor:
    """Undo `brought_together` for the S matrices of a field, each brought together on its own: (K, N) -> (N, K)."""
    (cols, rows), stacked = weights.shape, _STACKED.get(field.rpartition(".")[2], 1)
    return weights.view(cols, stacked, -1, group_size).permute(1, 3, 2, 0).reshape(rows, cols)


@dataclass(frozen=True)
class FieldCodec:
    """How one field of an expert is stored.

    A quantized field `gate_up_proj` becomes `gate_up_proj.codes`, `gate_up_proj.scale` and so on; a dense one, with no
    format, stays what it is. Matrices that are (in, out) in the module are packed as (out, in), so that groups run
    along the input.
    """

    field: FieldSpec
    format: HqqFormat | None = None
    is_transposed: bool = False
    loaded_dtype: str | None = None
    """Dtype that the field is decoded to; None for the dtype in `field`."""

    def __post_init__(self) -> None:
        _ = self.packing  # raises here for a format that does not fit, not when the first expert is encoded

    @cached_property
    def packing(self) -> Packing | None:
        """How the field's matrix is packed; None for a dense field."""
        if self.format is None:
            return None
        rows, cols = reversed(self.field.shape) if self.is_transposed else self.field.shape
        if self.format.axis == 0:
            rows, cols = cols, rows
        return packing_of(rows, cols, self.format, name=self.field.name)

    @cached_property
    def parts(self) -> tuple[FieldSpec, ...]:
        """The arrays that are stored."""
        if self.packing is None:
            return (self.field,)
        return tuple(replace(part, name=f"{self.field.name}.{part.name}") for part in self.packing.parts)

    @cached_property
    def _part_names(self) -> tuple[tuple[str, str], ...]:
        """Pairs of names of each array: in the matrix, and in the expert."""
        assert self.packing is not None
        return tuple((own.name, part.name) for own, part in zip(self.packing.parts, self.parts, strict=True))

    @property
    def has_arithmetic(self) -> bool:
        """Whether there are kernels for the matrix as it is packed."""
        return self.format is not None and self.format.axis == 1

    def encode(self, tensor: Tensor, name: str | None = None) -> dict[str, Tensor]:
        """The arrays that store a tensor of the field's shape; errors call it `name`."""
        assert tensor.shape == self.field.shape
        if self.format is None:
            return {self.field.name: tensor.to(getattr(torch, self.field.dtype))}
        matrix = quantize(tensor.t() if self.is_transposed else tensor, self.format, name=name or self.field.name)
        return {part: matrix.parts[own] for own, part in self._part_names}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor that these arrays store, in the field's shape and the dtype it is loaded in."""
        dtype = getattr(torch, self.loaded_dtype or self.field.dtype)
        if self.format is None:
            return parts[self.field.name].to(dtype)
        weight = dequantize(self.matrix(parts), dtype)
        if self.format.axis == 0:
            weight = put_back(weight, self.format.group_size, self.field.name)
        return weight.t().contiguous() if self.is_transposed else weight

    def matrix(self, parts: Mapping[str, Tensor]) -> PackedMatrix:
        """The packed matrix of a quantized field, sharing the arrays: (out, in), or (in, out) for axis 0."""
        assert self.packing is not None
        return PackedMatrix(self.packing, {own: parts[part] for own, part in self._part_names})


@dataclass(frozen=True)
class ExpertCodec(Codec):
    """How experts of a sparse layer are stored.

    Matrices are quantized; biases, norms and all other fields without exactly two dimensions stay as they are.
    """

    fields: tuple[FieldSpec, ...]
    format: HqqFormat | None
    """None where all fields are stored as they are."""
    is_transposed: bool = False
    loaded_dtype: str | None = None
    """Dtype that all fields are decoded to; None for the dtype that each has in `fields`."""

    def __post_init__(self) -> None:
        _ = self.codecs

    @cached_property
    def codecs(self) -> tuple[FieldCodec, ...]:
        """How each field is stored, in the order of the fields."""
        return tuple(
            FieldCodec(field, self.format, self.is_transposed, self.loaded_dtype)
            if len(field.shape) == 2 and not field.name.endswith("_bias")
            else FieldCodec(field, loaded_dtype=self.loaded_dtype)
            for field in self.fields
        )

    def encode(self, tensors: Mapping[str, Tensor], name: str = "the expert") -> dict[str, Tensor]:
        """Quantize an expert: its fields -> the arrays of `stored`. Errors call it `name`."""
        parts: dict[str, Tensor] = {}
        for codec in self.codecs:
            field = codec.field.name
            parts |= codec.encode(tensors[field], f"{field} of {name}")
        return parts

    def packing(self, name: str) -> Packing | None:
        """How the matrix that `matrices` returns for a field is packed; None for a field that it decodes."""
        return next(
            codec.packing if codec.has_arithmetic else None for codec in self.codecs if codec.field.name == name
        )

    @property
    def is_packed(self) -> bool:
        """Whether all matrices are in low bits that there are kernels for."""
        return self.format is not None and self.format.axis == 1

    @property
    def is_as_stored(self) -> bool:
        """Whether `matrices` returns the very arrays that are stored."""
        return self.format is None and all(self.loaded_dtype in (None, field.dtype) for field in self.fields)

    def matrices(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor | PackedMatrix]:
        """As in `Codec`."""
        return {
            codec.field.name: codec.matrix(parts) if codec.has_arithmetic else codec.decode(parts)
            for codec in self.codecs
        }

    def cast(self, dtype: str) -> ExpertCodec:
        """As in `Codec`."""
        return replace(self, loaded_dtype=dtype)
