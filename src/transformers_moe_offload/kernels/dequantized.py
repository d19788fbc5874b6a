"""Products on GPUs without Triton: the matrix is dequantized, then multiplied by torch's matmul.

Weights are computed in float32 and rounded to the rows' dtype, some millions at a time, in memory that torch's
allocator reuses.
"""

# T rows of input, N rows and K columns of the matrix

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.kernels.packed import PackedMatrix
from transformers_moe_offload.kernels.packing import unpack_rows
from transformers_moe_offload.kernels.reference import scales_and_zeros

WEIGHTS = 1 << 22
"""Weights dequantized at a time: enough to keep a GPU busy while the next step is launched; 16 MiB in float32."""


def linear(rows: Tensor, matrix: PackedMatrix, weights: int = WEIGHTS) -> Tensor:
    """rows (T, K) of any float dtype -> their products with the rows of the matrix, (T, N)."""
    packing, device = matrix.packing, rows.device
    out = torch.empty((len(rows), packing.rows), dtype=rows.dtype, device=device)
    step = min(max(1, weights // packing.cols), packing.rows)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scale, zero = (meta.unsqueeze(-1) for meta in scales_and_zeros(matrix))
        codes = torch.empty((step, packing.cols), dtype=torch.uint8, device=device)
        high = torch.empty_like(codes) if packing.nbits == 3 else None
        for start in range(0, packing.rows, step):
            stop = min(start + step, packing.rows)
            unpack_rows(matrix, start, codes[: stop - start], None if high is None else high[: stop - start])
            grouped = codes[: stop - start].view(stop - start, packing.groups, packing.group_size)
            tile = ((grouped - zero[start:stop]) * scale[start:stop]).view(stop - start, packing.cols)
            out[:, start:stop] = rows @ tile.to(rows.dtype).t()
    return out
