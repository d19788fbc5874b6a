"""Read a dense matrix inside a kernel, stored (N, C) or transposed, and multiply with it.

Products add up in float32. Rows and columns beyond the last ones count as zeros, so any shape is allowed.
"""

# N rows and C columns of the matrix, L rows of a program, T rows of input, B columns at a time

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weights_at(matrix, line, col, num_rows, num_cols, is_transposed: tl.constexpr):
    """line (L,), col (B,) -> (L, B) in the matrix's dtype."""
    row_step, col_step = (1, num_rows) if is_transposed else (num_cols, 1)
    place = line[:, None] * row_step + col[None, :] * col_step
    return tl.load(matrix + place, mask=(line < num_rows)[:, None] & (col < num_cols)[None, :], other=0)


@triton.jit
def dense_row(rows, matrix, num_rows, num_cols, line, is_transposed: tl.constexpr, width: tl.constexpr):
    """rows (C,) times the lines (L,) of the matrix -> (L,) float32."""
    terms = tl.zeros((line.shape[0], width), tl.float32)
    for first in range(0, num_cols, width):
        col = first + tl.arange(0, width)
        x = tl.load(rows + col, mask=col < num_cols, other=0).to(tl.float32)
        weight = weights_at(matrix, line, col, num_rows, num_cols, is_transposed)
        terms += weight.to(tl.float32) * x[None, :]
    return tl.sum(terms, axis=1)


@triton.jit
def dense_tile(
    rows, matrix, num_rows, num_cols, used_cols, source, is_row, line,
    is_transposed: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """`rows[source]` (T, C) times the lines (L,) of the matrix, over `used_cols` columns -> (T, L) float32."""
    total = tl.zeros((source.shape[0], line.shape[0]), tl.float32)
    for first in range(0, used_cols, width):
        col = first + tl.arange(0, width)
        x = tl.load(
            rows + source[:, None] * num_cols + col[None, :], mask=is_row[:, None] & (col < num_cols)[None, :], other=0
        )
        weight = weights_at(matrix, line, col, num_rows, num_cols, is_transposed).to(x.dtype)
        if x.dtype == tl.float32:
            total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
        else:
            total = tl.dot(x, tl.trans(weight), total)
    return total
