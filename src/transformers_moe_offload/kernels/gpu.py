"""Which kernels a GPU can run, and products by the best of them.

Triton comes with torch's builds for GPUs but is optional. It is imported when first needed, which takes a second.
Without it a matrix is dequantized, then multiplied by torch's matmul.
"""

# T rows of input, N rows and K columns of the matrix

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from transformers_moe_offload.kernels.packed import PackedMatrix, unpack_rows
from transformers_moe_offload.kernels.reference import scales_and_zeros

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of rows that the Triton kernels accept."""

CAPABILITY = (8, 0)
"""Lowest compute capability for the Triton kernels: tensor cores that multiply bfloat16."""


def linear(rows: Tensor, matrix: PackedMatrix) -> Tensor:
    """rows (T, K) of any float dtype, on a GPU -> their products with the rows of the matrix, (T, N)."""
    if rows.dtype in TYPES and missing(rows.device) is None:
        from transformers_moe_offload.kernels import triton

        return triton.linear(rows, matrix)
    return linear_dequantized(rows, matrix)


def cpu_stands_in() -> bool:
    """Whether the CPU stands in for a GPU, in Triton's interpreter; it then computes nothing that a GPU could not."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot be used, on this device or at all; None if they can.

    In Triton's interpreter (`TRITON_INTERPRET=1`) they can be used, slowly, on the device `cpu` if it is passed
    explicitly, so that code built on them can be tested without a GPU.
    """
    is_interpreted = device is not None and device.type == "cpu" and cpu_stands_in()
    if not is_interpreted and not torch.cuda.is_available():
        return "torch sees no GPU"
    if not is_interpreted and device is not None and device.type != "cuda":
        return f"Triton's kernels do not support {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if is_interpreted:
        return None
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}, not at least {CAPABILITY}"
    return None


WEIGHTS = 1 << 22
"""Weights dequantized at a time: enough to keep a GPU busy while the next step is launched; 16 MiB in float32."""


def linear_dequantized(rows: Tensor, matrix: PackedMatrix, weights: int = WEIGHTS) -> Tensor:
    """rows (T, K) of any float dtype -> their products with the rows of the matrix, (T, N), without Triton.

    Weights are computed in float32 and rounded to the rows' dtype, some millions at a time, in memory that torch's
    allocator reuses.
    """
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
