"""Groups along the outputs of a matrix, hqq's axis 0: such matrices are read, but none is quantized so.

There a group is g weights of one column, N / g rows apart. Brought together, column after column, they are the rows of
another matrix whose groups lie as ours do, so that is what is packed.
"""

# N rows (outputs), K columns (inputs), S matrices stacked along the rows, g group size

from __future__ import annotations

from torch import Tensor

_STACKED = {"gate_up_proj": 2}
"""Fields that are several matrices, each with groups of its own."""


def num_stacked(field: str) -> int:
    """How many matrices, S, a field of an expert is."""
    return _STACKED.get(field.rpartition(".")[2], 1)


def brought_together(weights: Tensor, group_size: int) -> Tensor:
    """weights (N, K), or their codes, of a single matrix -> (K, N), each group in one piece."""
    rows, cols = weights.shape
    return weights.reshape(group_size, rows // group_size, cols).permute(2, 1, 0).reshape(cols, rows)


def put_back(weights: Tensor, group_size: int, stacked: int = 1) -> Tensor:
    """The reverse for S matrices that were brought together one after another: (K, N) -> (N, K)."""
    cols, rows = weights.shape
    return weights.view(cols, stacked, -1, group_size).permute(1, 3, 2, 0).reshape(rows, cols)
