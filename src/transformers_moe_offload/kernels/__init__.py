"""Products with matrices in low bits, and with bfloat16 matrices for few rows.

The rest of the package calls `linear`. It uses the compiled kernels on CPUs where they were built, Triton's on GPUs,
else torch; `available` says which of them can be used, and why the others cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.config.options import choose
from transformers_moe_offload.kernels import cpu, dense, gpu, native
from transformers_moe_offload.kernels.cpu import Activations, linear_each
from transformers_moe_offload.kernels.operator import Linear, best_linear, compiled_linear
from transformers_moe_offload.kernels.packed import PackedMatrix, Packing
from transformers_moe_offload.kernels.reference import linear_transposed

__all__ = [
    "Activations",
    "PackedMatrix",
    "Packing",
    "available",
    "can_multiply_each",
    "dense",
    "linear",
    "linear_each",
    "linear_transposed",
]


def linear(rows: Tensor, matrix: PackedMatrix, *, activations: Activations = "exact") -> Tensor:
    """rows (T, K) of any float dtype -> their products with the rows of the matrix, (T, N), in the rows' dtype.

    Products are added up in float32. `activations="int8"` lets kernels that can round the rows to 8 bits, which is
    faster and about 1 % off. Differentiable in the rows.
    """
    if activations != "exact":
        choose("activations", activations, ("exact", "int8"))
    if rows.requires_grad and torch.is_grad_enabled():
        out: Tensor = Linear.apply(rows, matrix, activations)  # type: ignore[no-untyped-call]
        return out
    if torch.compiler.is_compiling():
        return compiled_linear(rows, matrix, activations)
    return best_linear(rows, matrix, activations)


def can_multiply_each(rows: Tensor) -> bool:
    """Whether `linear_each` takes rows like these."""
    return (
        rows.device.type == "cpu"
        and rows.dtype in cpu.TYPES
        and not (rows.requires_grad and torch.is_grad_enabled())
        and native.library() is not None
    )


def available() -> dict[str, str]:
    """Each kind of kernels -> the variant in use, or why they are not available."""
    found = native.native()
    missing = gpu.missing()
    return {
        "cpu": found.kernels or f"not available: {found.missing}",
        "gpu": "triton" if missing is None else f"not available: {missing}",
        "torch": "any device",
    }
