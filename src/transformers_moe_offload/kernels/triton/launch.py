"""Launch the kernels: which one, cut into programs of which size.

The sizes are those at which Triton 3.7 compiles the kernels for compute capability 8.0 and 9.0 with loads of 16 bytes
and few registers spilled, or none; which of them are fastest has yet to be measured on a GPU.
"""

# P rows of input, N rows and K columns of the matrix, E experts, R rows of bytes

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from transformers_moe_offload.kernels.packed import PackedMatrix, Packing
from transformers_moe_offload.kernels.triton.row import grouped_row_kernel, row_kernel
from transformers_moe_offload.kernels.triton.tile import grouped_tile_kernel, tile_kernel

PARTS = ("codes", "high", "scale", "zero", "scale_range", "zero_range")
"""Arrays of a matrix in the order in which kernels take them."""

LINES = 8
"""Rows of bytes of a program that multiplies one row."""
CODES = 8192
"""That such a program holds at a time, 64 for each thread."""
PIECE = 64
"""Columns that it adds up at a time, a group at most. Each piece looks up its own scale and zero; if there are fewer
pieces than threads, the compiler lets every thread look up many of them."""

PRODUCTS = 64
"""Of each row of input, by one program that multiplies tiles."""
HEIGHTS = {torch.float32: (16, 32), torch.bfloat16: (16, 32, 64), torch.float16: (16, 32, 64)}
"""Rows of input in a tile; tensor cores take no fewer than 16, and with more than these registers run out."""
TILE_PIECES = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}
"""Columns of a tile, a group at most."""


def linear(rows: Tensor, matrix: PackedMatrix) -> Tensor:
    """rows (P, K) float32, bfloat16 or float16 -> their products with the rows of the matrix, (P, N)."""
    packing = matrix.packing
    rows = rows.contiguous()
    count, cols = rows.shape
    assert cols == packing.cols
    out = torch.empty((count, packing.rows), dtype=rows.dtype, device=rows.device)
    parts = [matrix.parts.get(name, matrix.parts["codes"]) for name in PARTS]
    arguments = (rows, out, *parts, packing.rows, cols)
    with torch.cuda.device_of(rows):
        if count == 1:
            sizes = row_sizes(packing)
            row_kernel[1, _programs(packing, sizes)](*arguments, **sizes)
        elif count:
            sizes = tile_sizes(packing, rows.dtype, count)
            tile_kernel[triton.cdiv(count, sizes["height"]), _programs(packing, sizes)](*arguments, count, **sizes)
    return out


def grouped_linear(
    rows: Tensor, offsets: Tensor, addresses: Tensor, places: Mapping[str, int], packing: Packing, *, tokens: int
) -> Tensor:
    """Products of rows with the matrices of the experts they belong to, in one launch and without copying a weight.

    rows (P, K) float32, bfloat16 or float16, sorted by expert: those of expert e are `offsets[e]` to `offsets[e + 1]`
    of `offsets` (E + 1,) int32 or int64, and rows beyond the last come out as zeros. `addresses` (E,) int64 are those
    of the experts' records, multiples of 16, in memory that the device can read; only those of experts that have rows
    are looked at. `places` says how many bytes into a record each array of `packing.parts` begins. No expert has more
    rows than there are `tokens`, which only decides how the work is cut. -> (P, N).

    Nothing is read on the host: what counts is what `offsets` and `addresses` are when the kernel runs.
    """
    rows = rows.contiguous()
    (count, cols), num_experts = rows.shape, len(addresses)
    assert cols == packing.cols
    assert len(offsets) == num_experts + 1
    assert addresses.dtype == torch.int64
    at = [places.get(name, 0) for name in PARTS]
    assert all(place % 16 == 0 for place in at)
    out = torch.empty((count, packing.rows), dtype=rows.dtype, device=rows.device)
    arguments = (rows, out, offsets, addresses, *at, packing.rows, cols, num_experts)
    experts = triton.next_power_of_2(num_experts + 1)
    with torch.cuda.device_of(rows):
        if count and tokens == 1:
            sizes = row_sizes(packing)
            grouped_row_kernel[count, _programs(packing, sizes)](*arguments, **sizes, experts=experts)
        elif count:
            sizes = tile_sizes(packing, rows.dtype, min(tokens, triton.cdiv(count, num_experts)))
            grid = (most_tiles(count, num_experts, sizes["height"]), _programs(packing, sizes))
            grouped_tile_kernel[grid](*arguments, count, **sizes, experts=experts)
    return out


def row_sizes(packing: Packing) -> dict[str, int]:
    """How the kernels that multiply one row are cut."""
    piece_size = min(packing.group_size, PIECE)
    pieces = min(CODES // (LINES * _fields(packing) * piece_size), triton.next_power_of_2(packing.cols // piece_size))
    return _format(packing) | {"lines": LINES, "pieces": pieces, "piece_size": piece_size}


def tile_sizes(packing: Packing, dtype: torch.dtype, count: int) -> dict[str, int]:
    """How the kernels that multiply tiles are cut, for about so many rows of input with one matrix."""
    heights = HEIGHTS[dtype]
    height = next((height for height in heights if height >= count), heights[-1])
    return _format(packing) | {
        "lines": PRODUCTS // _fields(packing),
        "height": height,
        "piece_size": min(packing.group_size, TILE_PIECES[dtype]),
        "num_warps": 4 if height < 64 else 8,
    }


def most_tiles(count: int, num_experts: int, height: int) -> int:
    """That rows sorted by expert can fill, whoever they belong to.

    Each of those that have rows, nobody among them, can leave all but one row of its last tile empty.
    """
    return (count + min(num_experts + 1, count) * (height - 1)) // height


def _format(packing: Packing) -> dict[str, int]:
    return {"nbits": packing.nbits, "group_size": packing.group_size, "meta_nbits": packing.meta_nbits}


def _fields(packing: Packing) -> int:
    """Codes in a byte of `codes`."""
    return 8 // (2 if packing.nbits == 3 else packing.nbits)


def _programs(packing: Packing, sizes: Mapping[str, int]) -> int:
    """That it takes to compute a row of output."""
    return -(-packing.rows // (_fields(packing) * sizes["lines"]))
