"""One row of input at a time: what decoding one token needs.

Products are added up in float32, on the ordinary cores: with one row there is nothing for tensor cores to share.
"""

# P rows of input, N rows and K columns of the matrix, E experts, F fields of a byte, L lines of a program,
# B pieces of a group at a time, g the columns of a piece

from __future__ import annotations

import triton
import triton.language as tl

from transformers_moe_offload.kernels.triton.matrix import codes_at, meta_at, part, rows_of


@triton.jit
def row_kernel(
    rows, out, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    lines: tl.constexpr, pieces: tl.constexpr, piece_size: tl.constexpr,
):  # fmt: skip
    """Grid (P, ceil(R / L)). rows (P, K), out (P, N)."""
    width: tl.constexpr = 2 if nbits == 3 else nbits
    p = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1) * lines + tl.arange(0, lines)
    row = rows_of(line, num_rows, 8 // width)
    product = _product(
        rows + p * num_cols, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, line, row,
        nbits, group_size, meta_nbits, pieces, piece_size,
    )  # fmt: skip
    tl.store(out + p * num_rows + row, product.to(out.dtype.element_ty), mask=_is_mine(line, row, num_rows, 8 // width))


@triton.jit(do_not_specialize=["num_experts"])
def grouped_row_kernel(
    rows, out, offsets, addresses, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, num_experts,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    lines: tl.constexpr, pieces: tl.constexpr, piece_size: tl.constexpr, experts: tl.constexpr,
):  # fmt: skip
    """Grid (P, ceil(R / L)). rows (P, K), out (P, N), offsets (E + 1,), addresses (E,) int64; parts by their places.

    Rows beyond the last offset are nobody's, and come out as zeros.
    """
    width: tl.constexpr = 2 if nbits == 3 else nbits
    p = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1) * lines + tl.arange(0, lines)
    row = rows_of(line, num_rows, 8 // width)
    index = tl.arange(0, experts)
    is_expert = index < num_experts
    expert = tl.sum(((tl.load(offsets + 1 + index, mask=is_expert, other=0) <= p) & is_expert).to(tl.int32))
    product = tl.zeros(row.shape, tl.float32)
    if expert < num_experts:
        record = tl.load(addresses + expert)
        stored: tl.constexpr = tl.float16 if meta_nbits == 16 else tl.uint8
        product = _product(
            rows + p * num_cols, part(record, codes, tl.uint8), part(record, high, tl.uint8),
            part(record, scale, stored), part(record, zero, stored),
            part(record, scale_range, tl.float16), part(record, zero_range, tl.float16),
            num_rows, num_cols, line, row, nbits, group_size, meta_nbits, pieces, piece_size,
        )  # fmt: skip
    tl.store(out + p * num_rows + row, product.to(out.dtype.element_ty), mask=_is_mine(line, row, num_rows, 8 // width))


@triton.jit
def _is_mine(line, row, num_rows, fields: tl.constexpr):
    """Which of the rows (F, L) exist and are in the program's rows of bytes."""
    return (line < tl.cdiv(num_rows, fields))[None, :] & (row < num_rows)


@triton.jit
def _product(
    rows, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, line, row,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    pieces: tl.constexpr, piece_size: tl.constexpr,
):  # fmt: skip
    """rows (K,) times rows (F, L) of the matrix -> (F, L) float32."""
    num_groups = num_cols // group_size
    num_pieces = num_cols // piece_size
    total = tl.zeros(row.shape, tl.float32)
    for first in range(0, num_pieces, pieces):
        piece = first + tl.arange(0, pieces)
        is_piece = piece < num_pieces
        col = piece[:, None] * piece_size + tl.arange(0, piece_size)[None, :]
        x = tl.load(rows + col, mask=is_piece[:, None], other=0).to(tl.float32)
        code = codes_at(codes, high, line, col, is_piece[:, None], num_rows, num_cols, nbits)
        index = row[:, :, None] * num_groups + (piece // (group_size // piece_size))[None, None, :]
        is_meta = (row < num_rows)[:, :, None] & is_piece[None, None, :]
        centre = meta_at(zero, zero_range, index, is_meta, meta_nbits)
        unit = meta_at(scale, scale_range, index, is_meta, meta_nbits)
        terms = (code.to(tl.float32) - centre[:, :, :, None]) * x[None, None, :, :]
        total += tl.sum(tl.sum(terms, axis=3) * unit, axis=2)
    return total
