"""Cut the work into programs: how many rows of input, rows and columns of a matrix each of them takes.

The sizes are those at which Triton 3.7 compiles the kernels for compute capability 8.0 and 9.0 with loads of 16 bytes
and few registers spilled, or none; which of them are fastest has yet to be measured on a GPU.
"""

# P rows of input, N rows and C columns of the matrix, E experts, R rows of bytes

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from transformers_moe_offload.kernels.packed import Packing

LINES = 8
"""Rows of bytes, or of a dense matrix, of a program that multiplies one row."""
CODES = 8192
"""That such a program holds at a time, 64 for each thread."""
PIECE = 64
"""Columns that it adds up at a time, a group at most. Each piece looks up its own scale and zero; if there are fewer
pieces than threads, the compiler lets every thread look up many of them."""
WEIGHTS = 4096
"""Of a dense matrix that such a program holds at a time."""
TRANSPOSED_LINES = 64
"""Rows of a dense matrix (C, N) that it multiplies: those that lie side by side, 128 bytes of half precision."""

PRODUCTS = 64
"""Of each row of input, by one program that multiplies tiles."""
HEIGHTS = {torch.float32: (16, 32), torch.bfloat16: (16, 32, 64), torch.float16: (16, 32, 64)}
"""Rows of input in a tile; tensor cores take no fewer than 16, and with more than these registers run out."""
TILE_PIECES = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}
"""Columns of a tile, a group at most."""


def row_sizes(packing: Packing) -> dict[str, int]:
    """How the kernels that multiply one row with a packed matrix are cut."""
    piece_size = min(packing.group_size, PIECE)
    pieces = min(CODES // (LINES * packing.fields * piece_size), triton.next_power_of_2(packing.cols // piece_size))
    return {"lines": LINES, "pieces": pieces, "piece_size": piece_size}


def dense_row_sizes(cols: int, *, is_transposed: bool) -> dict[str, int]:
    """The same for dense matrices."""
    lines = TRANSPOSED_LINES if is_transposed else LINES
    return {"lines": lines, "pieces": 1, "piece_size": min(WEIGHTS // lines, triton.next_power_of_2(cols))}


def tile_height(dtype: torch.dtype, count: int) -> int:
    """Rows of a tile, for about so many rows of input with one matrix."""
    heights = HEIGHTS[dtype]
    return next((height for height in heights if height >= count), heights[-1])


def tile_sizes(packing: Packing | None, dtype: torch.dtype, height: int) -> dict[str, int]:
    """How the kernels that multiply tiles of so many rows are cut."""
    columns = TILE_PIECES[dtype]
    return {
        "lines": PRODUCTS if packing is None else PRODUCTS // packing.fields,
        "height": height,
        "piece_size": columns if packing is None else min(packing.group_size, columns),
        "num_warps": 4 if height < 64 else 8,
    }


def most_tiles(count: int, num_experts: int, height: int) -> int:
    """That rows sorted by expert can fill, whoever they belong to.

    Each of those that have rows, nobody among them, can leave all but one row of its last tile empty.
    """
    return (count + min(num_experts + 1, count) * (height - 1)) // height


def formats(packing: Packing) -> dict[str, int]:
    """What kernels are compiled for."""
    return {"nbits": packing.nbits, "group_size": packing.group_size, "meta_nbits": packing.meta_nbits}


def programs(rows: int, packing: Packing | None, sizes: Mapping[str, int]) -> int:
    """That it takes to compute a row of output; as many where half of a program's lines are gates, the others ups."""
    return -(-rows // (sizes["lines"] * (1 if packing is None else packing.fields)))
