"""Products with packed matrices on the CPU, by the compiled kernels of `csrc`.

Exact products add up float32 weights, rounded as the reference rounds them; each one in an order that depends on
nothing but the instruction set, so that results are the same bits for any number of threads and of rows.
"""

# T rows of input, N rows and K columns of the matrix

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.packed import PackedMatrix

Activations = Literal["exact", "int8"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of the rows, by the numbers of `csrc/lowbit.h`."""

BYTES_PER_THREAD = 1 << 18
"""Packed bytes, times rows of input, that are worth another thread."""


def linear(
    rows: Tensor, matrix: PackedMatrix, activations: Activations = "exact", threads: int | None = None
) -> Tensor:
    """rows (T, K) float32, bfloat16 or float16 -> their products with the rows of the matrix, (T, N).

    `int8` rounds each group of a row of input to integers of 8 bits: faster, and about 1 % off. `threads` are as many
    as torch has in this thread, unless given.
    """
    return linear_each(rows, [len(rows)], [matrix], activations, threads)


def linear_each(
    rows: Tensor,
    counts: Sequence[int],
    matrices: Sequence[PackedMatrix],
    activations: Activations = "exact",
    threads: int | None = None,
) -> Tensor:
    """rows (T, K) -> (T, N): as many as `counts` says are multiplied by each matrix in turn, all of one shape.

    All products are done together, so that threads are shared out once. Each row's has the same bits as on its own.
    """
    library = native.library()
    assert library is not None
    first = matrices[0].packing
    assert rows.shape == (sum(counts), first.cols)
    rows = rows.contiguous()
    out = torch.empty((len(rows), first.rows), dtype=rows.dtype)
    row_bytes, out_bytes = first.cols * rows.element_size(), first.rows * rows.element_size()
    row, product, packed_bytes = rows.data_ptr(), out.data_ptr(), 0
    numbers = array("q")
    for count, matrix in zip(counts, matrices, strict=True):
        numbers.extend((*_described(matrix), count, row, product))
        row += count * row_bytes
        product += count * out_bytes
        packed_bytes += count * matrix.parts["codes"].nbytes
    if threads is None:
        threads = min(torch.get_num_threads(), 1 + packed_bytes // BYTES_PER_THREAD)
    address, _ = numbers.buffer_info()
    if library.moe_linear(len(counts), address, TYPES[rows.dtype], activations == "int8", threads):
        raise MemoryError(f"no memory for {len(rows)} rows of {first.cols} numbers")
    return out


def _described(matrix: PackedMatrix) -> tuple[int, ...]:
    """A matrix in the numbers that `csrc/product.c` takes: shape, format, and where its arrays are."""
    packing, parts = matrix.packing, matrix.parts
    ranges = (parts["scale_range"].data_ptr(), parts["zero_range"].data_ptr()) if packing.meta_nbits == 8 else (0, 0)
    return (
        packing.rows,
        packing.cols,
        packing.nbits,
        packing.group_size,
        packing.meta_nbits,
        parts["codes"].data_ptr(),
        parts["high"].data_ptr() if packing.nbits == 3 else 0,
        parts["scale"].data_ptr(),
        parts["zero"].data_ptr(),
        *ranges,
    )
