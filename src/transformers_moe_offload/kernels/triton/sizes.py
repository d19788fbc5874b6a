"""Cut the work into programs: how many rows of input, rows and columns of a matrix each of them computes.

With these sizes Triton 3.7 compiles the kernels for compute capability 8.0 and 9.0 with loads of 16 bytes and few
registers spilled, or none; which sizes are fastest has yet to be measured on a GPU.
"""

# P rows of input, N rows and C columns of the matrix, E experts, R rows of bytes

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from transformers_moe_offload.kernels.packed import Packing

LINES = 8
"""Rows of bytes, or of a dense matrix, per program of the one-row kernels."""
CODES = 8192
"""Codes that a program of the one-row kernels holds at a time, 64 per thread."""
PIECE = 64
"""Most columns in a piece of a group. Each piece looks up its own scale and zero; with fewer pieces than threads, the
compiler makes every thread look up many of them."""
WEIGHTS = 4096
"""Weights of a dense matrix that a program of the one-row kernels holds at a time."""
TRANSPOSED_LINES = 64
"""Rows of a dense matrix stored (C, N) per program: neighbours in memory, 128 bytes of half precision."""

PRODUCTS = 64
"""Products of each row of input that a program of the tile kernels computes."""
HEIGHTS = {torch.float32: (16, 32), torch.bfloat16: (16, 32, 64), torch.float16: (16, 32, 64)}
"""Rows of input in a tile; tensor cores need at least 16, and larger tiles than these exhaust the registers."""
TILE_PIECES = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}
"""Columns of a tile, at most a group."""


def row_sizes(packing: Packing) -> dict[str, int]:
    """Sizes of the kernels that multiply one row with a packed matrix."""
    piece_size = min(packing.group_size, PIECE)
    pieces = min(CODES // (LINES * packing.fields * piece_size), triton.next_power_of_2(packing.cols // piece_size))
    return {"lines": LINES, "pieces": pieces, "piece_size": piece_size}


def dense_row_sizes(cols: int, *, is_transposed: bool) -> dict[str, int]:
    """Sizes of the kernels that multiply one row with a dense matrix."""
    lines = TRANSPOSED_LINES if is_transposed else LINES
    return {"lines": lines, "pieces": 1, "piece_size": min(WEIGHTS // lines, triton.next_power_of_2(cols))}


def tile_height(dtype: torch.dtype, count: int) -> int:
    """Rows of a tile, for about `count` rows of input per matrix."""
    heights = HEIGHTS[dtype]
    return next((height for height in heights if height >= count), heights[-1])


def tile_sizes(packing: Packing | None, dtype: torch.dtype, height: int) -> dict[str, int]:
    """Sizes of the kernels that multiply tiles of `height` rows."""
    columns = TILE_PIECES[dtype]
    return {
        "lines": PRODUCTS if packing is None else PRODUCTS // packing.fields,
        "height": height,
        "piece_size": columns if packing is None else min(packing.group_size, columns),
        "num_warps": 4 if height < 64 else 8,
    }


def most_tiles(count: int, num_experts: int, height: int) -> int:
    """Most tiles that `count` rows sorted by expert can fill, however they are distributed.

    Each expert with rows, and the group of idle rows, can leave all but one row of its last tile empty.
    """
    return (count + min(num_experts + 1, count) * (height - 1)) // height


def formats(packing: Packing) -> dict[str, int]:
    """The compile-time constants that describe a packing."""
    return {"nbits": packing.nbits, "group_size": packing.group_size, "meta_nbits": packing.meta_nbits}


def programs(rows: int, packing: Packing | None, sizes: Mapping[str, int]) -> int:
    """Programs that compute a row of output; the same number if half of a program's lines are gates and half ups."""
    return -(-rows // (sizes["lines"] * (1 if packing is None else packing.fields)))
