"""Launch the kernels that multiply with one packed matrix."""

# P rows of input, N rows and C columns of the matrix

from __future__ import annotations

import torch
import triton
from torch import Tensor

from transformers_moe_offload.kernels.packed import PackedMatrix
from transformers_moe_offload.kernels.triton.row import row_kernel
from transformers_moe_offload.kernels.triton.sizes import formats, programs, row_sizes, tile_height, tile_sizes
from transformers_moe_offload.kernels.triton.tile import tile_kernel

PARTS = ("codes", "high", "scale", "zero", "scale_range", "zero_range")
"""Arrays of a matrix in the order in which kernels take them."""


def linear(rows: Tensor, matrix: PackedMatrix) -> Tensor:
    """rows (P, C) float32, bfloat16 or float16 -> their products with the rows of the matrix, (P, N)."""
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
            grid = (1, programs(packing.rows, packing, sizes))
            row_kernel[grid](*arguments, **formats(packing), **sizes)
        elif count:
            sizes = tile_sizes(packing, rows.dtype, tile_height(rows.dtype, count))
            grid = (triton.cdiv(count, sizes["height"]), programs(packing.rows, packing, sizes))
            tile_kernel[grid](*arguments, count, **formats(packing), **sizes)
    return out
