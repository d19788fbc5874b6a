"""Products with packed matrices on the CPU, by the compiled kernels of `csrc`.

Exact products add up float32 weights, rounded as the reference rounds them; each one in an order that depends on
nothing but the instruction set, so that results are the same bits for any number of threads and of rows.
"""

# T rows of input, N rows and K columns of the matrix

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.packed import PackedMatrix

Activations = Literal["exact", "int8"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of the rows, by the numbers of `csrc/lowbit.h`."""

BYTES_PER_THREAD = 1 << 18
"""Packed bytes, times rows of input, that are worth another thread: two take 0.81 of one's time at 272 KiB, 0.66 at
1 MiB (4-bit, 2048 columns, torch 2.13, two Xeon cores with nothing else to do)."""


def linear(
    rows: Tensor, matrix: PackedMatrix, activations: Activations = "exact", threads: int | None = None
) -> Tensor:
    """rows (T, K) float32, bfloat16 or float16 -> their products with the rows of the matrix, (T, N).

    `int8` rounds each group of a row of input to integers of 8 bits: faster, and about 1 % off (0.6 % for
    normally distributed rows, 1.1 % for Student's t with 3 degrees of freedom). `threads` are as many
    as torch has in this thread, unless given.
    """
    library = native.library()
    assert library is not None
    packing, parts = matrix.packing, matrix.parts
    num_rows, cols = rows.shape
    assert cols == packing.cols
    rows = rows.contiguous()
    out = torch.empty((num_rows, packing.rows), dtype=rows.dtype)
    codes, high = parts["codes"], parts.get("high")
    has_ranges = packing.meta_nbits == 8
    if threads is None:
        threads = min(torch.get_num_threads(), 1 + num_rows * codes.nbytes // BYTES_PER_THREAD)
    failed = library.moe_linear(
        packing.rows,
        cols,
        packing.nbits,
        packing.group_size,
        packing.meta_nbits,
        codes.data_ptr(),
        None if high is None else high.data_ptr(),
        parts["scale"].data_ptr(),
        parts["zero"].data_ptr(),
        parts["scale_range"].data_ptr() if has_ranges else None,
        parts["zero_range"].data_ptr() if has_ranges else None,
        num_rows,
        rows.data_ptr(),
        out.data_ptr(),
        TYPES[rows.dtype],
        activations == "int8",
        threads,
    )
    if failed:
        raise MemoryError(f"no memory for {num_rows} rows of {cols} numbers")
    return out
