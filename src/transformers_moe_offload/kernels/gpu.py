"""Which kernels a GPU can run, and products by the best of them.

Triton comes with torch's builds for GPUs but is optional. It is imported when first needed, which takes a second.
"""

# T rows of input, N rows and K columns of the matrix

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from transformers_moe_offload.kernels import dequantized
from transformers_moe_offload.kernels.packed import PackedMatrix

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of rows that the Triton kernels accept."""

CAPABILITY = (8, 0)
"""Lowest compute capability for the Triton kernels: tensor cores that multiply bfloat16."""


def linear(rows: Tensor, matrix: PackedMatrix) -> Tensor:
    """rows (T, K) of any float dtype, on a GPU -> their products with the rows of the matrix, (T, N)."""
    if rows.dtype in TYPES and missing(rows.device) is None:
        from transformers_moe_offload.kernels import triton

        return triton.linear(rows, matrix)
    return dequantized.linear(rows, matrix)


@functools.cache
def missing(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot be used, on this device or at all; None if they can.

    In Triton's interpreter (`TRITON_INTERPRET=1`) they can be used, slowly, on the device `cpu` if it is passed
    explicitly, so that code built on them can be tested without a GPU.
    """
    is_interpreted = device is not None and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
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
