"""Products with packed and with plain bfloat16 matrices on the CPU, by the compiled kernels of `csrc`.

Exact products use float32 weights, rounded as in the reference, and add up in float32. The order of additions depends
only on the instruction set, so results have the same bits for any number of threads and rows. More than
`dense.FEW_ROWS` rows of bfloat16, or rounded to int8, are multiplied with the codes themselves where the processor has
instructions for sums of such products (`csrc/many.h`): as exactly, but in another order than few rows are.
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
"""Dtypes of rows -> their numbers in `csrc/lowbit.h`."""

BYTES_PER_THREAD = 1 << 18
"""Bytes of a matrix, times rows of input, per additional thread."""


def linear_each(
    rows: Tensor,
    counts: Sequence[int],
    matrices: Sequence[PackedMatrix | Tensor],
    activations: Activations = "exact",
    threads: int | None = None,
) -> Tensor:
    """rows (T, K) -> (T, N): the next `counts[i]` rows times `matrices[i]`; all matrices have one shape and kind.

    Rows are float32, bfloat16 or float16. Matrices are packed, or bfloat16 (N, K) and contiguous. For packed ones
    `int8` rounds each group of a row of input to 8-bit integers: faster, and about 1 % off. `threads` defaults to at
    most `torch.get_num_threads()`.

    One call computes all products, so threads are distributed once. Each matrix's products have the same bits as on
    their own.
    Rows must satisfy `kernels.can_multiply_each`, or, for plain bfloat16 matrices, `dense.reads_fast`.
    """
    library = native.library()
    assert library is not None
    described = [_described(matrix) for matrix in matrices]
    num_rows, num_cols, nbits, *_ = described[0]
    num_inputs, dtype, itemsize = rows.shape[0], rows.dtype, rows.dtype.itemsize
    assert rows.shape == (sum(counts), num_cols)
    is_one_row = rows.stride(0) == 0 and set(counts) == {1}  # one token's row, expanded over its experts
    rows = rows if is_one_row and rows.stride(1) == 1 else rows.contiguous()
    row_bytes = rows.stride(0) * itemsize if num_inputs > 1 else 0
    out = torch.empty((num_inputs, num_rows), dtype=dtype)
    row, product = rows.data_ptr(), out.data_ptr()
    numbers: list[int] = []
    for count, matrix in zip(counts, described, strict=True):
        numbers += *matrix, count, row, product
        row += count * row_bytes
        product += count * num_rows * itemsize
    if threads is None:
        read_bytes = num_inputs * num_rows * num_cols * nbits // 8
        threads = min(torch.get_num_threads(), 1 + read_bytes // BYTES_PER_THREAD)
    passed = array("q", numbers)
    if library.moe_linear(len(counts), passed.buffer_info()[0], TYPES[dtype], activations == "int8", threads):
        raise MemoryError(f"no memory for {num_inputs} rows of {num_cols} numbers")
    return out


STREAMS = (1, 2, 4, 8)
"""Rows of memory that `read_memory` can read side by side."""


def read_memory(memory: Tensor, streams: int, threads: int) -> int:
    """Read the bytes of a tensor, as some rows that lie one after another, side by side, and do nothing else.

    For measurements: no product gets at weights faster. memory uint8 (nbytes,) is read in parts of 1 MiB; returns its
    64-bit words combined by xor.
    """
    library = native.library()
    assert library is not None
    assert streams in STREAMS
    return int(library.moe_read(memory.data_ptr(), memory.nbytes, streams, threads))


def _described(matrix: PackedMatrix | Tensor) -> tuple[int, ...]:
    """A matrix as the numbers that `csrc/product.c` takes: shape, format, and addresses of its arrays."""
    if isinstance(matrix, Tensor):
        assert matrix.dtype == torch.bfloat16
        assert matrix.is_contiguous()
        num_rows, num_cols = matrix.shape
        return (num_rows, num_cols, 16, num_cols, 16, matrix.data_ptr(), 0, 0, 0, 0, 0)
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
