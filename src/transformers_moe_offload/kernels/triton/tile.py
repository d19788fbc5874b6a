"""Kernels that multiply tiles of rows on tensor cores: for prompts, and steps of several tokens.

Rows of half precision are multiplied with the codes themselves, which bfloat16 and float16 hold exactly, and the zero
is applied afterwards: `sum x * (code - zero) = sum x * code - zero * sum x`. So no weight is ever rounded to the rows'
dtype. float32 rows are multiplied with `code - zero` in float32.
"""

# P rows of output, N rows and C columns of the matrix, E experts, F fields of a byte, L lines of a program,
# T rows of a tile, g columns of a piece of a group

from __future__ import annotations

import triton
import triton.language as tl

from transformers_moe_offload.kernels.triton.gate import store
from transformers_moe_offload.kernels.triton.matrix import codes_at, dense_tile, lines_of, meta_at, part, rows_of


@triton.jit(do_not_specialize=["end"])
def tile_kernel(
    rows, out, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, end,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    lines: tl.constexpr, height: tl.constexpr, piece_size: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(P / T), ceil(R / L)). rows (P, C), out (P, N); `end` is P. One packed matrix for all."""
    fields: tl.constexpr = 8 // (2 if nbits == 3 else nbits)
    p = tl.program_id(0) * height + tl.arange(0, height).to(tl.int64)
    line = lines_of(tl.program_id(1), num_rows, fields, lines, "none")
    row = tl.reshape(rows_of(line, num_rows, fields), (fields * lines,))
    total = _packed_tile(
        rows, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, num_cols, p, p < end, line, row,
        nbits, group_size, meta_nbits, piece_size,
    )  # fmt: skip
    mask = (p < end)[:, None] & (row < num_rows)[None, :]
    tl.store(out + p[:, None] * num_rows + row[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_experts", "choices", "end"])
def grouped_tile_kernel(
    rows, out, order, offsets, addresses, weight, high, scale, zero, scale_range, zero_range, bias,
    num_rows, num_cols, num_experts, choices, end,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    dtype: tl.constexpr, is_transposed: tl.constexpr, bias_dtype: tl.constexpr, is_sorted: tl.constexpr,
    function: tl.constexpr, gate: tl.constexpr, limit: tl.constexpr, slope: tl.constexpr, shift: tl.constexpr,
    lines: tl.constexpr, height: tl.constexpr, piece_size: tl.constexpr, most_experts: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, programs of a row), with the most tiles that there can be; programs of excess tiles do nothing.

    rows (P / choices, C), out (P, N) or with gates (P, N / 2), order (P,), offsets (E + 1,), addresses (E,) int64; the
    arrays of a matrix are offsets into a record; `end` is P. Every expert begins a tile of its own. Pairs beyond the
    last offset are idle, and their rows of `out` are zeros. A dense matrix has `nbits` of 16 or more, and a dtype.
    """
    index = tl.arange(0, most_experts)
    begins = tl.load(offsets + index, mask=index <= num_experts, other=0)
    ends = tl.load(offsets + 1 + index, mask=index < num_experts, other=0)
    ends = tl.where(index == num_experts, end, ends)  # index E holds the idle pairs
    tiles = tl.where(index <= num_experts, tl.cdiv(ends - begins, height), 0)
    through = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    expert = tl.sum((through <= tile).to(tl.int32))
    if expert <= num_experts:
        is_it = index == expert
        begin, stop = tl.sum(tl.where(is_it, begins, 0)), tl.sum(tl.where(is_it, ends, 0))
        before = tl.sum(tl.where(index < expert, tiles, 0))
        at = begin + (tile - before) * height + tl.arange(0, height)
        is_row = at < stop
        p = at.to(tl.int64) if is_sorted else tl.load(order + at, mask=is_row, other=0).to(tl.int64)
        source = p // choices
        is_expert = expert < num_experts
        record = tl.load(addresses + expert, mask=is_expert, other=0)
        used_cols = tl.where(is_expert, num_cols, 0)
        is_dense: tl.constexpr = nbits >= 16
        fields: tl.constexpr = 1 if is_dense else 8 // (2 if nbits == 3 else nbits)
        line = lines_of(tl.program_id(1), num_rows, fields, lines, gate)
        row = tl.reshape(rows_of(line, num_rows, fields), (fields * lines,))
        if is_dense:
            total = dense_tile(
                rows, part(record, weight, dtype), num_rows, num_cols, used_cols, source, is_row, line,
                is_transposed, piece_size,
            )  # fmt: skip
        else:
            stored: tl.constexpr = tl.float16 if meta_nbits == 16 else tl.uint8
            total = _packed_tile(
                rows, part(record, weight, tl.uint8), part(record, high, tl.uint8),
                part(record, scale, stored), part(record, zero, stored),
                part(record, scale_range, tl.float16), part(record, zero_range, tl.float16),
                num_rows, num_cols, used_cols, source, is_row, line, row, nbits, group_size, meta_nbits, piece_size,
            )  # fmt: skip
        has_bias: tl.constexpr = bias_dtype is not None
        store(
            out, p, is_row, total, row, num_rows, part(record, bias, bias_dtype if has_bias else tl.uint8), is_expert,
            function, gate, limit, slope, shift, has_bias,
        )  # fmt: skip


@triton.jit
def _packed_tile(
    rows, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, used_cols, source, is_row, line, row,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr, piece_size: tl.constexpr,
):  # fmt: skip
    """`rows[source]` (T, C) times the rows (F * L,) of the matrix, over the first `used_cols` columns -> (T, F * L)."""
    num_groups = num_cols // group_size
    total = tl.zeros((source.shape[0], row.shape[0]), tl.float32)
    for piece in range(used_cols // piece_size):
        col = piece * piece_size + tl.arange(0, piece_size)[None, :]
        x = tl.load(rows + source[:, None] * num_cols + col, mask=is_row[:, None], other=0)
        code = codes_at(codes, high, line, col, col >= 0, num_rows, num_cols, nbits)
        code = tl.reshape(code, (row.shape[0], piece_size)).to(tl.float32)
        index = row * num_groups + piece // (group_size // piece_size)
        centre = meta_at(zero, zero_range, index, row < num_rows, meta_nbits)
        unit = meta_at(scale, scale_range, index, row < num_rows, meta_nbits)
        if x.dtype == tl.float32:
            terms = tl.dot(x, tl.trans(code - centre[:, None]), input_precision="ieee")
        else:
            terms = tl.dot(x, tl.trans(code.to(x.dtype))) - tl.sum(x.to(tl.float32), axis=1)[:, None] * centre[None, :]
        total += terms * unit[None, :]
    return total
