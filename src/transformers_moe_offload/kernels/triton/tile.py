"""Tiles of rows at a time, on tensor cores: prompts, and steps of several tokens.

Rows of half precision are multiplied with the codes themselves, which bfloat16 and float16 hold exactly, and the zero
comes in afterwards: `sum x * (code - zero) = sum x * code - zero * sum x`. So no weight is ever rounded to the rows'
dtype. float32 rows are multiplied with `code - zero` in float32.
"""

# P rows of input, N rows and K columns of the matrix, E experts, F fields of a byte, L lines of a program,
# T rows of a tile, g columns of a piece of a group

from __future__ import annotations

import triton
import triton.language as tl

from transformers_moe_offload.kernels.triton.matrix import codes_at, meta_at, part, rows_of


@triton.jit(do_not_specialize=["end"])
def tile_kernel(
    rows, out, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, end,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    lines: tl.constexpr, height: tl.constexpr, piece_size: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(P / T), ceil(R / L)). rows (P, K), out (P, N); `end` is P."""
    p = tl.program_id(0) * height + tl.arange(0, height).to(tl.int64)
    _multiply(
        rows, out, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, p, p < end, num_cols,
        nbits, group_size, meta_nbits, lines, piece_size,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_experts", "end"])
def grouped_tile_kernel(
    rows, out, offsets, addresses, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, num_experts,
    end,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    lines: tl.constexpr, height: tl.constexpr, piece_size: tl.constexpr, experts: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, ceil(R / L)), of tiles at least as many as there can be: those too many find nothing to do.

    rows (P, K), out (P, N), offsets (E + 1,), addresses (E,) int64; parts by their places; `end` is P. Every expert
    begins a tile of its own. Rows beyond the last offset are nobody's, and come out as zeros.
    """
    index = tl.arange(0, experts)
    begins = tl.load(offsets + index, mask=index <= num_experts, other=0)
    ends = tl.load(offsets + 1 + index, mask=index < num_experts, other=0)
    ends = tl.where(index == num_experts, end, ends)  # whoever comes after the last expert has the rows of nobody
    tiles = tl.where(index <= num_experts, tl.cdiv(ends - begins, height), 0)
    through = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    expert = tl.sum((through <= tile).to(tl.int32))
    if expert <= num_experts:
        is_it = index == expert
        begin, stop = tl.sum(tl.where(is_it, begins, 0)), tl.sum(tl.where(is_it, ends, 0))
        before = tl.sum(tl.where(index < expert, tiles, 0))
        p = begin + (tile - before) * height + tl.arange(0, height).to(tl.int64)
        is_expert = expert < num_experts
        record = tl.load(addresses + expert, mask=is_expert, other=0)
        stored: tl.constexpr = tl.float16 if meta_nbits == 16 else tl.uint8
        _multiply(
            rows, out, part(record, codes, tl.uint8), part(record, high, tl.uint8),
            part(record, scale, stored), part(record, zero, stored),
            part(record, scale_range, tl.float16), part(record, zero_range, tl.float16),
            num_rows, num_cols, p, p < stop, tl.where(is_expert, num_cols, 0),
            nbits, group_size, meta_nbits, lines, piece_size,
        )  # fmt: skip


@triton.jit
def _multiply(
    rows, out, codes, high, scale, zero, scale_range, zero_range, num_rows, num_cols, p, is_row, used_cols,
    nbits: tl.constexpr, group_size: tl.constexpr, meta_nbits: tl.constexpr,
    lines: tl.constexpr, piece_size: tl.constexpr,
):  # fmt: skip
    """Write the products of the rows p (T,) with the program's rows of the matrix; only of the first `used_cols`."""
    width: tl.constexpr = 2 if nbits == 3 else nbits
    fields: tl.constexpr = 8 // width
    line = tl.program_id(1) * lines + tl.arange(0, lines)
    row = tl.reshape(rows_of(line, num_rows, fields), (fields * lines,))
    is_mine = (row < num_rows) & tl.reshape(
        tl.broadcast_to((line < tl.cdiv(num_rows, fields))[None, :], (fields, lines)), (fields * lines,)
    )
    num_groups = num_cols // group_size
    total = tl.zeros((p.shape[0], fields * lines), tl.float32)
    for piece in range(used_cols // piece_size):
        col = piece * piece_size + tl.arange(0, piece_size)[None, :]
        x = tl.load(rows + p[:, None] * num_cols + col, mask=is_row[:, None], other=0)
        code = codes_at(codes, high, line, col, col >= 0, num_rows, num_cols, nbits)
        code = tl.reshape(code, (fields * lines, piece_size)).to(tl.float32)
        index = row * num_groups + piece // (group_size // piece_size)
        centre = meta_at(zero, zero_range, index, is_mine, meta_nbits)
        unit = meta_at(scale, scale_range, index, is_mine, meta_nbits)
        if x.dtype == tl.float32:
            terms = tl.dot(x, tl.trans(code - centre[:, None]), input_precision="ieee")
        else:
            terms = tl.dot(x, tl.trans(code.to(x.dtype))) - tl.sum(x.to(tl.float32), axis=1)[:, None] * centre[None, :]
        total += terms * unit[None, :]
    tl.store(
        out + p[:, None] * num_rows + row[None, :],
        total.to(out.dtype.element_ty),
        mask=is_row[:, None] & is_mine[None, :],
    )
