"""Quantize a matrix: code its groups in chunks that fit a CPU cache, then pack the codes.

Of each group the scale comes first, for it follows from the group's range alone; then the zero that suits the scale as
stored; then the codes nearest to the weights under both as stored. `kernels/solver.py` has the arithmetic. Scales and
zeros are stored as float16, or in 8 bits with a minimum and a step for each `META_BLOCK` of them.

hqq spans the codes from a group's smallest to its largest weight. This is inexact where 0 lies far outside the range:
nearly equal weights get an enormous zero, which float16 rounds coarsely, and which in 8 bits widens the steps of all
zeros of its block. So where all weights of a group have one sign, other spans are tried as well, and the one with the
smallest error is kept.
"""

# N rows (outputs), K columns (inputs), g group size, G = K / g groups in a row, M groups, or their values,
# U units: groups stored together, each single or META_BLOCK of them, B = ceil(M / META_BLOCK) blocks

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.config.formats import HqqFormat
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.kernels.packed import META_BLOCK, PackedMatrix, Packing, pack
from transformers_moe_offload.kernels.solver import Solver, solver_for

LARGEST = 65504.0
"""Largest finite float16."""
SMALLEST = 2.0**-24
"""Smallest positive float16, subnormal."""
FARTHEST = LARGEST * LARGEST
"""Largest weight that a zero and a scale in float16 can express."""


def stored(values: Tensor, meta_nbits: int, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """The arrays that hold values (M,) float32, under the names of `Packing.parts`, and the values read back (M,).

    The rest of a matrix is fitted to the latter.
    """
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


@dataclass(frozen=True)
class CodedGroups:
    """Groups as they are stored, and their scales and zeros as they are read back."""

    codes: Tensor
    """(M, g) uint8."""
    meta: dict[str, Tensor]
    """Scales and zeros under the names of `Packing.parts`: M entries each, or U for the ranges of blocks."""
    scale: Tensor
    """(M,) float32, like `zero`."""
    zero: Tensor


class _Span(NamedTuple):
    """The range that the codes of each group span: code c means `base + c * scale`; both (M,)."""

    base: Tensor
    scale: Tensor


def code_groups(groups: Tensor, format: HqqFormat, solver: Solver, name: str) -> CodedGroups:
    """Quantize groups (M, g) float32, the first of which begins a block.

    Raises `CheckpointError`, which calls them `name`, if a weight is infinite or not a number.
    """
    low, high = solver.ranges(groups)
    if not (torch.isfinite(low) & torch.isfinite(high)).all():  # sync: device -> host
        raise CheckpointError(
            f"{name} has weights that cannot be quantized: {int((~torch.isfinite(groups)).sum())} of {groups.numel()} "
            "looked at are infinite or not a number; fix the checkpoint, or leave this layer as it is"
        )
    if torch.maximum(-low, high).max() > FARTHEST:
        groups, low, high = (values.clamp(-FARTHEST, FARTHEST) for values in (groups, low, high))
    own, *others = _spans(low, high, 2**format.nbits - 1)
    coded = _coded(groups, own, format, solver)
    is_one_sided = (low > 0) | (high < 0)
    if is_one_sided.any():
        for span in others:
            _keep_better(coded, groups, is_one_sided, span, format, solver)
    return coded


def _spans(low: Tensor, high: Tensor, max_code: int) -> list[_Span]:
    """low, high (M,) -> three spans: from low to high; for groups of one sign also from 0, and with a scale of the
    largest weight.

    Where 0 lies outside the range, the first span is widened by the rounding of the zero to float16, 2^-11 of the
    weights, and keeps the zero below 2^15. Where no scale in float16 is large enough, the span is centred on 0.
    """
    is_one_sided = (low > 0) | (high < 0)
    peak = torch.maximum(-low, high)
    own = (high - low) / max_code
    widened = torch.maximum((high - low + peak * 2.0**-11) / max_code, peak * 2.0**-15)
    base = torch.where(is_one_sided, low, low.clamp(min=-LARGEST * max_code / 2))
    return [
        _Span(start, torch.where(peak == 0, 0, torch.where(is_one_sided, scale, own).clamp(SMALLEST, LARGEST)))
        for start, scale in ((base, widened), (base.clamp(max=0), peak / max_code), (base, peak))
    ]


def _coded(groups: Tensor, span: _Span, format: HqqFormat, solver: Solver) -> CodedGroups:
    max_code = 2**format.nbits - 1
    scale_parts, scale = _stored_scale(span.scale, format)
    zero = torch.where(scale == 0, 0, -span.base / scale)
    if format.nbits == 4:
        zero = zero.round()  # as hqq 0.2.8 does, after AutoAWQ
    if format.optimize:
        zero = solver.fit_zeros(groups, scale, zero, max_code)
    zero_parts, zero = stored(zero, format.meta_nbits, "zero")
    return CodedGroups(solver.nearest_codes(groups, scale, zero, max_code), scale_parts | zero_parts, scale, zero)


def _stored_scale(scale: Tensor, format: HqqFormat) -> tuple[dict[str, Tensor], Tensor]:
    """As `stored`, but in 8 bits a scale is not rounded down so far that the codes miss the ends of the range.

    A tenth is allowed, and a quarter of a code: with 8-bit codes of weights with outliers, in groups of 16, rounding
    to the nearest step was a tenth worse (error 0.0043 against 0.0039), and with 4 bits no better than this.
    """
    parts, read = stored(scale, format.meta_nbits, "scale")
    if format.meta_nbits == 8:
        parts["scale"] += read < scale * (1 - min(0.1, 0.25 / (2**format.nbits - 1)))
        read = from_eight_bits(parts["scale"], parts["scale_range"])
    return parts, read


def _keep_better(
    coded: CodedGroups, groups: Tensor, is_one_sided: Tensor, span: _Span, format: HqqFormat, solver: Solver
) -> None:
    """Quantize units with one-sided groups again, with another span; a smaller error replaces the result so far."""
    unit = 1 if format.meta_nbits == 16 else META_BLOCK
    tried_units = _by_unit(is_one_sided, unit).any(1)
    tried = tried_units.repeat_interleave(unit)[: len(groups)]
    again = _coded(groups[tried], _Span(span.base[tried], span.scale[tried]), format, solver)
    before = _squared_errors(coded.codes[tried], coded.scale[tried], coded.zero[tried], groups[tried])
    after = _squared_errors(again.codes, again.scale, again.zero, groups[tried])
    better_units = _by_unit(after, unit).sum(1) < _by_unit(before, unit).sum(1)
    better = better_units.repeat_interleave(unit)[: len(after)]
    units, places = tried_units.nonzero()[better_units, 0], tried.nonzero()[better, 0]
    for kept, new in ((coded.codes, again.codes), (coded.scale, again.scale), (coded.zero, again.zero)):
        kept[places] = new[better]
    for name, part in coded.meta.items():
        if name.endswith("_range"):
            part[units] = again.meta[name][better_units]
        else:
            part[places] = again.meta[name][better]


def _squared_errors(codes: Tensor, scale: Tensor, zero: Tensor, groups: Tensor) -> Tensor:
    """codes and groups (M, g), scale and zero (M,) -> (M,) float64."""
    return ((codes - zero[:, None]).double() * scale[:, None] - groups).square_().sum(1)


def _by_unit(values: Tensor, unit: int) -> Tensor:
    """values (M,) -> (U, unit), filled up with zeros."""
    return functional.pad(values, (0, -len(values) % unit)).view(-1, unit)


def packing_of(rows: int, cols: int, format: HqqFormat, *, name: str = "the matrix") -> Packing:
    """How a format packs a matrix (rows, cols); errors call it `name`."""
    if cols % format.group_size:
        raise ConfigError(
            f"group_size={format.group_size} does not divide the {cols} inputs of {name}, {rows} x {cols}; "
            "choose one that does, or leave this layer as it is"
        )
    return Packing(rows, cols, format.nbits, format.group_size, format.meta_nbits)


@torch.no_grad()
def quantize(
    weight: Tensor, format: HqqFormat, *, name: str = "the matrix", solver: Solver | None = None
) -> PackedMatrix:
    """weight (N, K) of any float dtype, on any device -> the quantized matrix, on the same device.

    The same weights always give the same bytes. A weight that is infinite or not a number is a `CheckpointError`, which
    calls the matrix `name`.
    """
    if format.axis != 1:
        raise ConfigError(
            f"{name} cannot be quantized with axis={format.axis}, which is for reading only; choose axis=1"
        )
    rows, cols = weight.shape
    packing = packing_of(rows, cols, format, name=name)
    solver = solver or solver_for(weight)
    groups = weight.reshape(-1, format.group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    pieces: list[dict[str, Tensor]] = []
    step = max(1, solver.chunk_of(weight) // (format.group_size * META_BLOCK)) * META_BLOCK
    for start in range(0, len(groups), step):
        coded = code_groups(groups[start : start + step].float().contiguous(), format, solver, name)
        codes[start : start + step] = coded.codes
        pieces.append(coded.meta)
    meta = {
        part.name: torch.cat([piece[part.name] for piece in pieces]).view(part.shape)
        for part in packing.parts
        if part.name not in ("codes", "high")
    }
    return PackedMatrix(packing, pack(codes.view(weight.shape), packing) | meta)
