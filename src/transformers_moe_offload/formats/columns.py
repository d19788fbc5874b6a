"""Groups along the outputs of a matrix, hqq's axis 0: such matrices can be read, but not quantized.

Such a group is g weights of one column, N / g rows apart. With each group brought together, column after column, the
weights form a (K, N) matrix whose groups lie along its rows, as with axis 1; that matrix is packed.
"""

# N rows (outputs), K columns (inputs), S matrices stacked along the rows, g group size

from __future__ import annotations

from torch import Tensor

_STACKED = {"gate_up_proj": 2}
"""Fields that stack several matrices, each with groups of its own."""


def brought_together(weights: Tensor, group_size: int) -> Tensor:
    """weights (N, K), or their codes, of a single matrix -> (K, N), each group in one piece."""
    rows, cols = weights.shape
    return weights.reshape(group_size, rows // group_size, cols).permute(2, 1, 0).reshape(cols, rows)


def put_back(weights: Tensor, group_size: int, field: str) -> Tensor:
    """Undo `brought_together` for the S matrices of a field, each brought together on its own: (K, N) -> (N, K)."""
    (cols, rows), stacked = weights.shape, _STACKED.get(field.rpartition(".")[2], 1)
    return weights.view(cols, stacked, -1, group_size).permute(1, 3, 2, 0).reshape(rows, cols)
