"""Experts that another method has quantized: a record holds the arrays as the checkpoint stores them.

A function of that method dequantizes one expert's arrays each time the expert is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from transformers_moe_offload.expert import FieldSpec

Open = Callable[[list[Tensor]], Tensor]
"""Turns the arrays of one field of one expert into the field (up to leading dimensions of 1), on their device."""


@dataclass(frozen=True)
class ForeignField:
    """One field of an expert and the arrays that store it."""

    field: FieldSpec
    """The field as the method dequantizes it."""
    parts: tuple[FieldSpec, ...]
    open: Open | None = None
    """None where the field is stored as it is, in one array."""

    def decode(self, parts: Mapping[str, Tensor], casts: Sequence[str]) -> Tensor:
        """The field from its arrays, by name, cast to one dtype after another."""
        tensors = [parts[part.name] for part in self.parts]
        with torch.no_grad():
            tensor = tensors[0] if self.open is None else self.open(tensors).detach().reshape(self.field.shape)
            for dtype in (self.field.dtype, *casts):
                tensor = tensor.to(getattr(torch, dtype))
        return tensor


@dataclass(frozen=True)
class ForeignCodec:
    """How the experts of one sparse layer are stored; a `Codec`."""

    fields: tuple[ForeignField, ...]
    casts: tuple[str, ...] = ()
    """Dtypes that the model was cast to since it was loaded: opened weights are cast to each in turn, as those of a
    plain model were."""

    @cached_property
    def stored(self) -> tuple[FieldSpec, ...]:
        """All arrays of an expert, in the order in which they are stored."""
        return tuple(part for field in self.fields for part in field.parts)

    def decode(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The fields of an expert; the results never share memory with the arrays."""
        return {
            name: tensor.clone() if any(tensor is part for part in parts.values()) else tensor
            for name, tensor in self.matrices(parts).items()
        }

    def decode_field(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """One of the fields that `decode` returns; may share memory with the arrays."""
        return self._by_name[name].decode(parts, self.casts)

    @property
    def is_packed(self) -> bool:
        """There are no kernels for other methods' formats."""
        return False

    def matrices(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All fields, decoded; fields that are stored as they are used are not copied."""
        return {field.field.name: field.decode(parts, self.casts) for field in self.fields}

    def cast(self, dtype: str) -> ForeignCodec:
        """This codec with one more cast after opening."""
        return replace(self, casts=(*self.casts, dtype))

    @cached_property
    def _by_name(self) -> dict[str, ForeignField]:
        return {field.field.name: field for field in self.fields}
