"""Products with ordinary bfloat16 matrices, where torch's own are slow.

- A few rows of input are bound by reading the matrix, and torch's kernels do not reach memory bandwidth. The compiled
  ones do: with one row, and 1024 x 1024 matrices that come from memory, they read 38 GB/s, torch's `mv` 15; with five
  rows 31, torch's `linear` 23 (torch 2.13, two cores of an EPYC with AVX-512 and bfloat16 units).
- One row of another dtype, or without those kernels, goes through `mv`: for bfloat16 it reads weights 1.35 times as
  fast as `linear`, whose matmul reorders them first (torch 2.13, 1536 x 1024, one Xeon core with AMX: 10.2 against
  7.4 GB/s), and its error against float64 is the same. Autocast casts for `linear` but not for `mv`.
- Several rows, on processors that cannot multiply bfloat16, take torch almost as long together as one by one (4096 x
  14336, 64 rows, one Zen 3 core: 707 ms, and 155 ms in float32). Casting a few rows of the matrix at a time to float32,
  in a buffer that stays in the cache, takes 152 ms, and is more exact.
"""

# T rows of input, N rows and K columns of the matrix

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.kernels import cpu, native
from transformers_moe_offload.kernels.reference import scratch

TILE_ROWS = 512
"""Rows of a matrix that are cast at a time, as in the 152 ms measurement above."""

FEW_ROWS = 8
"""Up to this many rows the compiled kernels are at least as fast as torch with bfloat16 units: 22 against 21 GB/s with
8 rows in the first measurement above; with 12 they are slower, 19 against 20."""


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (T, K), weight (N, K) -> (T, N), as `torch.nn.functional.linear`, by the fastest kernel available.

    The choice of kernel depends on the number of rows, never on where the weight is in memory.
    """
    num_rows, dtype = rows.shape[0], rows.dtype
    if not _is_plain(rows, weight):
        return functional.linear(rows, weight)
    is_half = dtype == weight.dtype == torch.bfloat16
    if is_half and num_rows <= FEW_ROWS and weight.is_contiguous() and native.library() is not None:
        return cpu.linear_each(rows, (num_rows,), (weight,))
    if num_rows == 1:
        return torch.mv(weight, rows[0]).unsqueeze(0)
    if wants_tiles(num_rows, dtype, has_units=has_bfloat16_units()):
        return linear_in_tiles(rows, weight)
    return functional.linear(rows, weight)


def reads_fast(rows: Tensor) -> bool:
    """Whether the compiled kernels multiply rows like these, if they are few, by bfloat16 matrices."""
    return rows.dtype == torch.bfloat16 and _is_plain(rows) and native.library() is not None


def wants_tiles(num_rows: int, dtype: torch.dtype, *, has_units: bool) -> bool:
    """Whether float32 tiles are faster: from two rows on; one row is bound by reading the matrix."""
    return dtype == torch.bfloat16 and num_rows >= 2 and not has_units


def linear_in_tiles(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (T, K), weight (N, K) -> (T, N) in the rows' dtype, added up in float32."""
    out = torch.empty((len(rows), len(weight)), dtype=rows.dtype)
    inputs = rows.float()
    for some, tile in _tiles(weight):
        out[:, some] = inputs @ tile.t()
    return out


def linear_transposed(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (T, N), weight (N, K) -> (T, K), the gradient of `linear`, in float32 tiles where that is faster."""
    if rows.device.type != "cpu" or not wants_tiles(len(rows), rows.dtype, has_units=has_bfloat16_units()):
        return rows @ weight
    inputs = rows.float()
    out = torch.zeros((len(rows), weight.shape[1]))
    for some, tile in _tiles(weight):
        out.addmm_(inputs[:, some], tile)
    return out.to(rows.dtype)


def _tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which rows of the matrix, and their float32 weights. The next tile overwrites the last one."""
    for some in (slice(start, start + TILE_ROWS) for start in range(0, len(weight), TILE_ROWS)):
        yield some, scratch("dense", tuple(weight[some].shape), torch.float32, weight.device).copy_(weight[some])


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this processor has instructions to multiply bfloat16 (AVX512-BF16 or AMX); True if unknown."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    known = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(is_supported is None or is_supported() for is_supported in known)


def _is_plain(*tensors: Tensor) -> bool:
    """Whether a product runs on a CPU, without gradients and without autocast."""
    if tensors[0].device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.is_grad_enabled() or not any(one.requires_grad for one in tensors)
