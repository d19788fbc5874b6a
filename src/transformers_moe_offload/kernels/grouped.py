"""What a launch for many experts at once needs to know: how a matrix lies in their records, who wants whom, and what is
done to products before they are stored.

Values only, so that they can be made where Triton is not installed; `kernels/triton/grouped.py` computes with them.
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
    """What becomes of products (P, N): an activation of each, or of gates that are multiplied with their `up` (P, I).

    `function(min(gate, limit)) * (clamp(up, -limit, limit) + shift)`; clamped only where there is a limit.
    """

    function: Function
    has_gate: bool = False
    """Whether rows of the matrix are gates and ups, I = N / 2 of each."""
    is_interleaved: bool = False
    """Whether a gate's up is the next row, instead of that I further down."""
    limit: float | None = None
    slope: float = 1.0
    shift: float = 0.0

    def outputs(self, rows: int) -> int:
        """How many of them there are for so many rows of the matrix."""
        return rows // 2 if self.has_gate else rows


@dataclass(frozen=True)
class PlacedMatrix:
    """A matrix with a place in every expert's record, the same in each."""

    rows: int
    """N, outputs."""
    cols: int
    """C, inputs."""
    places: Mapping[str, int]
    """Bytes into a record at which its arrays begin, multiples of 16: those of `packing.parts`, or `weight`; `bias`."""
    packing: Packing | None = None
    """None where the matrix is dense."""
    dtype: torch.dtype | None = None
    """Of a dense matrix."""
    is_transposed: bool = False
    """Whether a dense matrix is stored (C, N) instead of (N, C)."""
    bias_dtype: torch.dtype | None = None
    """None where there is no bias."""

    def __post_init__(self) -> None:
        assert all(place % 16 == 0 for place in self.places.values())
        assert (self.packing is None) == (self.dtype is not None)
        assert self.packing is None or (self.packing.rows, self.packing.cols) == (self.rows, self.cols)

    def can_activate(self, activation: Activation) -> bool:
        """Whether whoever computes a gate of this matrix has its up at hand, too."""
        if not activation.has_gate:
            return True
        fields = 1 if self.packing is None else self.packing.fields
        if self.rows % 2:
            return False
        if activation.is_interleaved:
            return fields == 1 or -(-self.rows // fields) % 2 == 0
        return self.rows % fields == 0  # both are in one byte then, if there are several codes in it


class Pairs(NamedTuple):
    """The (token, choice) pairs of a layer, on the device.

    A pair is idle if its index is no expert's or its weight is zero. What is launched depends on the shapes and on
    `num_tokens` only; what is in the tensors counts when it runs.
    """

    num_pairs: int
    """P."""
    addresses: Tensor
    """(E,) int64, of the experts' records: multiples of 16, in memory that the device can read. Those of experts that
    nobody wants are not looked at."""
    choices: int
    """K: pair p is token p // K's."""
    chosen: Tensor | None = None
    """(P,) int64 or int32, the expert of each pair; None if `offsets` tell all."""
    weights: Tensor | None = None
    """(P,) routing weights; None if no pair is idle on account of its weight."""
    offsets: Tensor | None = None
    """(E + 1,) int32 or int64: the pairs of expert e are at `offsets[e]` to `offsets[e + 1]` of `order`, those beyond
    the last one are idle. None if each pair is computed on its own."""
    order: Tensor | None = None
    """(P,) int32, the pairs sorted by expert; None if they are."""
    rows_per_expert: int = 1
    """About how many there are. Decides how the work is cut, and so must not depend on what is resident."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.addresses.shape[0]
