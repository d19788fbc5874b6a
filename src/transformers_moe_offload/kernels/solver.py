"""The arithmetic of quantizing, group by group: find the range, fit the zero, choose the codes.

The zero is fitted by the half-quadratic solver of HQQ (Badri and Shaji, 2023), with the defaults of hqq 0.2.8
(`optimize_weights_proximal_legacy` in `hqq/core/optimize.py`, whose `kappa` is never applied). Each iteration rounds
the codes for the current zero, splits the residuals into the part that a p-norm of 0.7 would shrink away and the rest,
and sets the zero to the mean that explains the rest.

Two differences. hqq stops when the mean error of all groups no longer falls; here a group is finished when its zero
no longer changes, so that its result does not depend on the other groups. And hqq fits to a scale that is rounded
afterwards; here the scale is the one that is stored.
"""

# M groups, g weights in a group

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from transformers_moe_offload.kernels import native

ITERATIONS = 20
BETA, LP_NORM = 10.0, 0.7
SHRUNK_AWAY = BETA ** (-1 / (2 - LP_NORM))
"""Residuals up to this size, 0.17, shrink to zero: there |r| <= |r|^(p - 1) / beta."""


class Solver:
    """The steps of quantizing groups (M, g) float32, contiguous, with scale (M,) and zero (M,) float32.

    In torch, on any device.
    """

    def chunk_of(self, groups: Tensor) -> int:
        """How many weights to pass at a time: on a CPU 128 KiB, which fits one core's cache, elsewhere all.

        torch never splits so few weights among threads, which would let the rounding of powers depend on the number of
        threads.
        """
        return 1 << 15 if groups.device.type == "cpu" else groups.numel()

    def ranges(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest weight of each group, (M,) each; not finite where a weight is not."""
        return groups.amin(1), groups.amax(1)

    def fit_zeros(self, groups: Tensor, scale: Tensor, start: Tensor, max_code: int) -> Tensor:
        """The zeros that fit the scales, (M,), searched for from `start` (M,)."""
        scale = torch.where(scale == 0, 1.0, scale)
        scaled, zero = groups / scale[:, None], start
        mean, low, high = scaled.mean(1), scaled.amin(1), scaled.amax(1)
        for _ in range(ITERATIONS):
            codes = (scaled + zero[:, None]).round_().clamp_(0, max_code)
            fitted = codes.mean(1) - mean
            largest = torch.maximum(-(low + zero), high + zero - max_code).clamp_(min=0.5)
            (kept,) = (largest * scale > SHRUNK_AWAY).nonzero(as_tuple=True)
            if len(kept):
                residuals = (scaled[kept] - codes[kept] + zero[kept, None]) * scale[kept, None]
                fitted[kept] += _shrunk(residuals).mean(1) / scale[kept]
            if torch.equal(fitted, zero):
                break
            zero = fitted
        return zero

    def nearest_codes(self, groups: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
        """The codes of which `(code - zero) * scale` is nearest to the weights, (M, g) uint8; 0 where scale is 0."""
        codes = (groups / torch.where(scale == 0, 1.0, scale)[:, None]).add_(zero[:, None]).round_()
        return codes.clamp_(0, max_code).mul_((scale != 0)[:, None]).to(torch.uint8)


class FusedSolver(Solver):
    """The solver in C (`csrc/hqq_solver.c`), on the CPU, in the calling thread, which releases the GIL.

    Its zeros are those of `Solver` except for rounding, and the same on every processor. It finds them eight times
    as fast, and quantizes matrices four times as fast in all (2048 x 1024, 4 bits, groups of 64, one Xeon core: 100
    million weights a second against 24).
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def chunk_of(self, groups: Tensor) -> int:
        """512 KiB, which fits the L2 cache of one core."""
        return 1 << 17

    def ranges(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Solver`."""
        low, high = groups.new_empty(len(groups)), groups.new_empty(len(groups))
        self._library.moe_hqq_ranges(*_described(groups), _address(low), _address(high))
        return low, high

    def fit_zeros(self, groups: Tensor, scale: Tensor, start: Tensor, max_code: int) -> Tensor:
        """As in `Solver`."""
        zero = start.clone()
        self._library.moe_hqq_fit_zeros(*_described(groups), _address(scale), _address(zero), max_code)
        return zero

    def nearest_codes(self, groups: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
        """As in `Solver`."""
        codes = torch.empty(groups.shape, dtype=torch.uint8)
        self._library.moe_hqq_nearest_codes(
            *_described(groups), _address(scale), _address(zero), max_code, _address(codes)
        )
        return codes


def solver_for(weight: Tensor) -> Solver:
    """The fastest solver available for a matrix."""
    library = native.library() if weight.device.type == "cpu" else None
    return Solver() if library is None else FusedSolver(library)


def _described(groups: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]:
    """The arguments that describe groups (M, g) to the C functions: address, M, g."""
    return _address(groups), ctypes.c_int64(groups.shape[0]), ctypes.c_int(groups.shape[1])


def _address(values: Tensor) -> ctypes.c_void_p:
    assert values.is_contiguous()
    return ctypes.c_void_p(values.data_ptr())


def _shrunk(residuals: Tensor) -> Tensor:
    """Residuals after shrinking by a p-norm: zero where they are small."""
    size = residuals.abs()
    return (size - size.pow(LP_NORM - 1) / BETA).clamp_(min=0).mul_(residuals.sign())
