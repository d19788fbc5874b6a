"""Products with ordinary bfloat16 matrices on processors that cannot multiply bfloat16.

There torch multiplies several rows of input almost as slowly as one after another (4096 x 14336, 64 rows, one Zen 3
core: 707 ms, and 155 ms in float32). A few rows of the matrix at a time, cast to float32 in a buffer that stays in the
cache, are multiplied in 152 ms, and more exactly.
"""

# T rows of input, N rows and K columns of the matrix

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.kernels.scratch import scratch

TILE_ROWS = 512
"""Rows of a matrix that are cast at a time, as in that measurement."""


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (T, K), weight (N, K) -> (T, N), as `torch.nn.functional.linear`, in float32 tiles where that is faster."""
    is_plain = rows.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    needs_grad = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    if is_plain and not needs_grad and wants_tiles(len(rows), rows.dtype, has_units=has_bfloat16_units()):
        return linear_in_tiles(rows, weight)
    return functional.linear(rows, weight)


def wants_tiles(num_rows: int, dtype: torch.dtype, *, has_units: bool) -> bool:
    """Whether float32 tiles are faster: from two rows on; one row is bound by reading the matrix."""
    return dtype == torch.bfloat16 and num_rows >= 2 and not has_units


def linear_in_tiles(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (T, K), weight (N, K) -> (T, N) in the rows' dtype, added up in float32."""
    out = torch.empty((len(rows), len(weight)), dtype=rows.dtype)
    inputs = rows.float()
    for start in range(0, len(weight), TILE_ROWS):
        some = weight[start : start + TILE_ROWS]
        tile = scratch("dense", (len(some), weight.shape[1]), torch.float32, weight.device).copy_(some)
        out[:, start : start + len(some)] = inputs @ tile.t()
    return out


def linear_transposed(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (T, N), weight (N, K) -> (T, K), the gradient of `linear`, in float32 tiles where that is faster."""
    if rows.device.type == "cpu" and wants_tiles(len(rows), rows.dtype, has_units=has_bfloat16_units()):
        return linear_transposed_in_tiles(rows, weight)
    return rows @ weight


def linear_transposed_in_tiles(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (T, N), weight (N, K) -> (T, K) in the rows' dtype, added up in float32."""
    inputs = rows.float()
    out = torch.zeros((len(rows), weight.shape[1]))
    for start in range(0, len(weight), TILE_ROWS):
        some = weight[start : start + TILE_ROWS]
        tile = scratch("dense", (len(some), weight.shape[1]), torch.float32, weight.device).copy_(some)
        out.addmm_(inputs[:, start : start + len(some)], tile)
    return out.to(rows.dtype)


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 itself (AVX512-BF16 or AMX); true of those we know nothing about."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    known = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(is_supported is None or is_supported() for is_supported in known)
