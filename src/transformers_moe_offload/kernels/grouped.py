"""The arguments of a launch for many experts at once: where a matrix lies in their records, which token goes to which
expert, and the activation of the products.

Values only, so that they can be built without Triton; `kernels/triton/grouped.py` computes with them.
"""

# T tokens, K experts per token, E experts, P = T * K pairs, N rows (outputs) and C columns (inputs) of a matrix,
# I outputs of a gate

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from transformers_moe_offload.kernels.packed import Packing

Function = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
"""`silu` is `x * sigmoid(slope * x)`; `relu2` the square of `relu`."""


@dataclass(frozen=True)
class Activation:
    """The activation of products (P, N): of each product, or of gates that are multiplied with their ups -> (P, I).

    `function(min(gate, limit)) * (clamp(up, -limit, limit) + shift)`; without a limit nothing is clamped.
    """

    function: Function
    has_gate: bool = False
    """Whether the rows of the matrix are gates and ups, I = N / 2 of each."""
    is_interleaved: bool = False
    """Whether the up of a gate is the next row; if not, it is the row I further down."""
    limit: float | None = None
    slope: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class PlacedMatrix:
    """A matrix that every expert's record holds at the same place."""

    rows: int
    """N, outputs."""
    cols: int
    """C, inputs."""
    places: Mapping[str, int]
    """Offsets of its arrays in a record, in bytes, multiples of 16: of `packing.parts`, or `weight`; and of `bias`."""
    packing: Packing | None = None
    """None where the matrix is dense."""
    dtype: torch.dtype | None = None
    """Dtype of a dense matrix."""
    is_transposed: bool = False
    """Whether a dense matrix is stored (C, N) instead of (N, C)."""
    bias_dtype: torch.dtype | None = None
    """None where there is no bias."""

    def __post_init__(self) -> None:
        assert all(place % 16 == 0 for place in self.places.values())
        assert (self.packing is None) == (self.dtype is not None)
        assert self.packing is None or (self.packing.rows, self.packing.cols) == (self.rows, self.cols)

    def can_activate(self, activation: Activation) -> bool:
        """Whether the program that computes a gate of this matrix also computes its up."""
        if not activation.has_gate:
            return True
        fields = 1 if self.packing is None else self.packing.fields
        if self.rows % 2:
            return False
        if activation.is_interleaved:
            return fields == 1 or -(-self.rows // fields) % 2 == 0
        return self.rows % fields == 0  # with several codes in a byte, a gate and its up then share one


class Pairs(NamedTuple):
    """The (token, choice) pairs of a layer, on the device.

    A pair is idle if its index is out of range or its weight is zero. A launch depends on the shapes and the plain
    numbers only; the kernels read the tensors when they run.
    """

    num_pairs: int
    """P."""
    addresses: Tensor
    """(E,) int64, addresses of the experts' records: multiples of 16, in memory that the device can read. Addresses of
    experts without pairs are never read."""
    choices: int
    """K: pair p belongs to token p // K."""
    chosen: Tensor | None = None
    """(P,) int64 or int32, the expert of each pair; None if `offsets` suffice."""
    weights: Tensor | None = None
    """(P,) routing weights; None if no pair is idle because of its weight."""
    offsets: Tensor | None = None
    """(E + 1,) int32 or int64: the pairs of expert e are `order[offsets[e] : offsets[e + 1]]`; pairs beyond the last
    offset are idle. None if each pair is computed on its own."""
    order: Tensor | None = None
    """(P,) int32, the pairs sorted by expert; None if the pairs already are in that order."""
    rows_per_expert: int = 1
    """Approximate. Decides how the work is cut, and so must not depend on which experts are resident."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.addresses.shape[0]
