"""Kernels that multiply one row of input at a time, for decoding one token.

Products add up in float32, without tensor cores, which need several rows that share a matrix.
"""

# P rows of output, C columns and N rows of the matrix, E experts, F fields of a byte, L lines of a program,
# B pieces of a group at a time, g the columns of a piece

from __future__ import annotations

import triton
import triton.language as tl

from transformers_moe_offload.kernels.triton.gate import store
from transformers_moe_offload.kernels.triton.matrix import codes_at, dense_row, lines_of, meta_at, part, rows_of
from transformers_moe_offload.kernels.triton.pairs import expert_of


@triton.jit
def row_kernel(
    rows, out, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    lines: tl.constexpr, pieces: tl.constexpr, piece_size: tl.constexpr,
):  # fmt: skip
    """Grid (P, ceil(R / L)). rows (P, C), out (P, N); one packed matrix for all."""
    fields: tl.constexpr = 8 // (2 if nbits == 3 else nbits)
    p = tl.program_id(0).to(tl.int64)
    line = lines_of(tl.program_id(1), num_rows, fields, lines, "none")
    row = rows_of(line, num_rows, fields)
    product = _packed_row(
        rows + p * num_cols, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, line, row,
        nbits, group_size, meta_nbits, pieces, piece_size,
    )  # fmt: skip
    tl.store(out + p * num_rows + row, product.to(out.dtype.element_ty), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_experts", "choices"])
def grouped_row_kernel(
    rows, out, chosen, weights, addresses, weight, high, scale, zero, scale_range, zero_range, bias,
    num_rows, num_cols, num_experts, choices,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    dtype: tl.constexpr, is_transposed: tl.constexpr, bias_dtype: tl.constexpr, has_weights: tl.constexpr,
    function: tl.constexpr, gate: tl.constexpr, limit: tl.constexpr, slope: tl.constexpr, shift: tl.constexpr,
    lines: tl.constexpr, pieces: tl.constexpr, piece_size: tl.constexpr,
):  # fmt: skip
    """Grid (P, programs of a row). rows (P / choices, C), out (P, N) or with gates (P, N / 2), chosen (P,),
    weights (P,), addresses (E,) int64; the arrays of a matrix are offsets into a record.

    A dense matrix has `nbits` of 16 or more, a dtype, and no groups. Rows of idle pairs are zeros.
    """
    is_dense: tl.constexpr = nbits >= 16
    fields: tl.constexpr = 1 if is_dense else 8 // (2 if nbits == 3 else nbits)
    p = tl.program_id(0).to(tl.int64)
    line = lines_of(tl.program_id(1), num_rows, fields, lines, gate)
    row = rows_of(line, num_rows, fields)
    expert = expert_of(chosen, weights, p, p >= 0, num_experts, has_weights)
    is_expert = expert < num_experts
    product = tl.zeros((fields, lines), tl.float32)
    record = tl.load(addresses + expert, mask=is_expert, other=0)
    source = rows + (p // choices) * num_cols
    if is_expert:
        if is_dense:
            product = tl.reshape(
                dense_row(
                    source, part(record, weight, dtype), num_rows, num_cols, line, is_transposed, pieces * piece_size
                ),
                (fields, lines),
            )
        else:
            stored: tl.constexpr = tl.float16 if meta_nbits == 16 else tl.uint8
            product = _packed_row(
                source, part(record, weight, tl.uint8), part(record, high, tl.uint8),
                part(record, scale, stored), part(record, zero, stored),
                part(record, scale_range, tl.float16), part(record, zero_range, tl.float16),
                num_rows, num_cols, line, row, nbits, group_size, meta_nbits, pieces, piece_size,
            )  # fmt: skip
    has_bias: tl.constexpr = bias_dtype is not None
    store(
        out, p + tl.arange(0, 1), tl.full((1,), True, tl.int1),
        tl.reshape(product, (1, fields * lines)), tl.reshape(row, (fields * lines,)), num_rows,
        part(record, bias, bias_dtype if has_bias else tl.uint8), is_expert,
        function, gate, limit, slope, shift, has_bias,
    )  # fmt: skip


@triton.jit
def _packed_row(
    rows, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, line, row,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    pieces: tl.constexpr, piece_size: tl.constexpr,
):  # fmt: skip
    """rows (C,) times rows (F, L) of the matrix -> (F, L) float32."""
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
