"""How scales and zeros are stored: as float16, or in 8 bits with a minimum and a step for each `META_BLOCK` of them.

`stored` returns the arrays *and* the values read back from them, because the rest of a matrix is fitted to the latter.
"""

# M values, B = ceil(M / META_BLOCK) blocks

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.kernels.packed import META_BLOCK

LARGEST = 65504.0
"""Largest finite float16."""
SMALLEST = 2.0**-24
"""Smallest positive float16, subnormal."""


def stored(values: Tensor, meta_nbits: int, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """The arrays that hold values (M,) float32, under the names of `Packing.parts`, and the values read back (M,)."""
    if meta_nbits == 16:
        half = in_half(values)
        return {name: half}, half.float()
    codes, ranges = in_eight_bits(values)
    return {name: codes, f"{name}_range": ranges}, from_eight_bits(codes, ranges)


def in_half(values: Tensor) -> Tensor:
    """values (M,) float32 -> (M,) float16, the nearest finite ones."""
    return values.clamp(-LARGEST, LARGEST).half()


def in_eight_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """values (M,) float32 -> steps (M,) uint8, and minimum and step of each block (B, 2) float16.

    The minimum is rounded down and the step up, so that every value within float16's range is stored to within half a
    step.
    """
    finite = values.clamp(-LARGEST, LARGEST)
    blocks = _in_blocks(finite)
    minimum = _half_at_most(blocks.amin(1))
    span = blocks.amax(1) - minimum.float()
    step = -_half_at_most(-span / 255)
    divisor = torch.where(step == 0, 1, step).float()
    codes = ((blocks - minimum.float()[:, None]) / divisor[:, None]).round_().clamp_(0, 255)
    return codes.view(-1)[: len(values)].to(torch.uint8), torch.stack([minimum, step], 1)


def from_eight_bits(codes: Tensor, ranges: Tensor) -> Tensor:
    """The values that `in_eight_bits` stored, (M,) float32."""
    minimum, step = ranges.float().unbind(1)
    values = _in_blocks(codes.float()).mul(step[:, None]).add_(minimum[:, None])
    return values.view(-1)[: len(codes)]


def _in_blocks(values: Tensor) -> Tensor:
    """values (M,) -> (B, META_BLOCK), the last block filled up with the last value."""
    missing = -len(values) % META_BLOCK
    return torch.cat([values, values[-1:].expand(missing)]).view(-1, META_BLOCK)


def _half_at_most(values: Tensor) -> Tensor:
    """values (B,) float32 -> float16, rounded down."""
    half = values.half()
    lower = (values - values.abs() * 2**-10 - SMALLEST).clamp_(min=-LARGEST).half()
    return torch.where(half.float() > values, lower, half)
