"""Read a matrix inside a kernel, packed or dense.

Packed: a byte holds codes of `fields` rows of the matrix, R rows apart (`kernels/packed.py`). A program takes some
consecutive rows of bytes, `lines`, and computes all rows of the matrix in them, so that every byte is read once.

Dense: stored (N, C) or transposed. Products add up in float32. Rows and columns beyond the last ones count as zeros, so
any shape is allowed.
"""

# N rows and K or C columns of the matrix, R rows of bytes, F fields of a byte, L lines of a program, T rows of input,
# B pieces of a group at a time, or columns of a dense matrix, g the columns of a piece

from __future__ import annotations

import triton
import triton.language as tl

from transformers_moe_offload.kernels.packed import META_BLOCK

BLOCK = tl.constexpr(META_BLOCK)

ALIGNED = tl.constexpr(16)
"""Alignment of arrays in a record, in bytes, so that a thread can load 16 bytes at once."""


@triton.jit
def part(record, at, dtype: tl.constexpr):
    """A pointer to the array `at` bytes into the record with this address."""
    return tl.multiple_of((record + at).to(tl.pointer_type(dtype)), ALIGNED)


@triton.jit
def lines_of(program, num_rows, fields: tl.constexpr, lines: tl.constexpr, gate: tl.constexpr):
    """The rows of bytes, (L,), that a program computes; past the last row where too few are left.

    With "halves" a program that computes a gate also computes its up. With several fields both are in one byte.
    """
    index = tl.arange(0, lines)
    if gate == "halves" and fields == 1:
        half: tl.constexpr = lines // 2
        num_gates = num_rows // 2
        line = program * half + index % half
        line = tl.where(line < num_gates, line + (index // half) * num_gates, num_rows)
    else:
        line = program * lines + index
    return line


@triton.jit
def rows_of(line, num_rows, fields: tl.constexpr):
    """Rows of the matrix in these rows of bytes, `num_rows` or more for padding: line (L,) -> (F, L)."""
    num_lines = tl.cdiv(num_rows, fields)
    row = tl.arange(0, fields)[:, None] * num_lines + line[None, :]
    return tl.where(line[None, :] < num_lines, row, num_rows)


@triton.jit
def codes_at(codes, high, line, col, is_col, num_rows, num_cols, nbits: tl.constexpr):
    """The codes in these rows of bytes: line (L,), col (B, g) with the mask is_col (B, 1) -> (F, L, B, g) int32."""
    width: tl.constexpr = 2 if nbits == 3 else nbits
    fields: tl.constexpr = 8 // width
    is_byte = (line < tl.cdiv(num_rows, fields))[:, None, None] & is_col[None, :, :]
    packed = tl.load(codes + (line[:, None, None] * num_cols + col[None, :, :]), mask=is_byte, other=0).to(tl.int32)
    shift = 8 - width * (tl.arange(0, fields) + 1)
    code = (packed[None, :, :, :] >> shift[:, None, None, None]) & (2**width - 1)
    if nbits == 3:
        row = rows_of(line, num_rows, fields)
        high_rows = tl.cdiv(num_rows, 8)
        is_high = (row < num_rows)[:, :, None, None] & is_col[None, None, :, :]
        place = (row % high_rows)[:, :, None, None] * num_cols + col[None, None, :, :]
        bits = tl.load(high + place, mask=is_high, other=0).to(tl.int32)
        code |= ((bits >> (7 - row // high_rows)[:, :, None, None]) & 1) << 2
    return code


@triton.jit
def meta_at(values, ranges, index, is_there, meta_nbits: tl.constexpr):
    """Scales, or zeros, as float32, at flat indices into (N, G); 0 where `is_there` is False."""
    value = tl.load(values + index, mask=is_there, other=0).to(tl.float32)
    if meta_nbits == 8:
        block = 2 * (index // BLOCK)
        minimum = tl.load(ranges + block, mask=is_there, other=0).to(tl.float32)
        step = tl.load(ranges + block + 1, mask=is_there, other=0).to(tl.float32)
        value = minimum + step * value
    return value


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
