"""Name one expert, and describe what the experts of one sparse layer are made of.

Values only: no tensors live here, so that policies and the planner can be read and tested without torch.
A *sparse layer* is one module that holds routed experts; its index is its place in `model.named_modules()`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1, "complex64": 8,
}  # fmt: skip
"""Bytes of one element, by the name torch gives the dtype."""


class ExpertId(NamedTuple):
    """Which expert of which sparse layer."""

    layer: int
    expert: int


@dataclass(frozen=True)
class FieldSpec:
    """One tensor of one expert: its name in the module, its shape without the expert dimension, its dtype's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def cast(self, dtype: str) -> FieldSpec:
        """The same tensor in another dtype."""
        return replace(self, dtype=dtype)


@dataclass(frozen=True)
class ExpertSpec:
    """What each expert of one sparse layer is made of."""

    layer: int
    name: str
    """Path of the experts module in the model, e.g. `model.layers.3.mlp.experts`."""
    num_experts: int
    fields: tuple[FieldSpec, ...]

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert's tensors, without padding."""
        return sum(field.nbytes for field in self.fields)
