"""Experts that another method has quantized: a record holds the arrays as the checkpoint stores them.

A function of that method dequantizes one expert's arrays each time the expert is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import Codec

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
    casts: tuple[str, ...] = ()
    """Dtypes that the model was cast to since it was loaded: an opened weight is cast to each in turn, as those of a
    plain model were."""

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The field from its arrays, by name."""
        tensors = [parts[part.name] for part in self.parts]
        with torch.no_grad():
            tensor = tensors[0] if self.open is None else self.open(tensors).detach().reshape(self.field.shape)
            for dtype in (self.field.dtype, *self.casts):
                tensor = tensor.to(getattr(torch, dtype))
        return tensor


@dataclass(frozen=True)
class ForeignCodec(Codec):
    """How the experts of one sparse layer are stored; there are no kernels for other methods' formats."""

    fields: tuple[ForeignField, ...]

    @property
    def codecs(self) -> tuple[ForeignField, ...]:
        """As in `Codec`."""
        return self.fields

    def cast(self, dtype: str) -> ForeignCodec:
        """This codec with one more cast after opening."""
        return ForeignCodec(tuple(replace(field, casts=(*field.casts, dtype)) for field in self.fields))
