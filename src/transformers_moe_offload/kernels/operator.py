"""The product with a packed matrix, for autograd and for `torch.compile`: differentiable in the rows, and one operator.

`torch.compile` cannot trace its kernels: they are called through ctypes on a CPU, and under another current device on a
GPU, and either would be a graph break.
"""

# T rows of input, N rows and K columns of the matrix

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformers_moe_offload.kernels import cpu, gpu, native, reference
from transformers_moe_offload.kernels.cpu import Activations
from transformers_moe_offload.kernels.packed import PackedMatrix, Packing


def best_linear(rows: Tensor, matrix: PackedMatrix, activations: Activations) -> Tensor:
    """rows (T, K) -> (T, N), by the best kernel available for their device and dtype."""
    if rows.device.type == "cpu" and rows.dtype in cpu.TYPES and native.library() is not None:
        return cpu.linear_each(rows, [len(rows)], [matrix], activations)
    if rows.device.type == "cuda":
        return gpu.linear(rows, matrix)
    return reference.linear(rows, matrix)


def compiled_linear(rows: Tensor, matrix: PackedMatrix, activations: Activations) -> Tensor:
    """As `best_linear`, as an operator that `torch.compile` can capture; without gradients."""
    packing = matrix.packing
    parts = [matrix.parts[part.name] for part in packing.parts]
    numbers = [packing.rows, packing.cols, packing.nbits, packing.group_size, packing.meta_nbits]
    found: Tensor = packed_linear(rows, parts, numbers, activations)
    return found


@torch.library.custom_op("transformers_moe_offload::packed_linear", mutates_args=())
def packed_linear(rows: Tensor, parts: list[Tensor], packing: list[int], activations: str) -> Tensor:
    """rows (T, K), the arrays of a matrix in the order of its packing's parts, the packing's fields -> (T, N)."""
    packed = Packing(*packing)
    matrix = PackedMatrix(packed, {part.name: array for part, array in zip(packed.parts, parts, strict=True)})
    return best_linear(rows, matrix, "int8" if activations == "int8" else "exact")


@packed_linear.register_fake
def _shape(rows: Tensor, parts: list[Tensor], packing: list[int], activations: str) -> Tensor:
    return rows.new_empty(rows.shape[0], packing[0])


class Linear(torch.autograd.Function):
    """`best_linear`, differentiable in the rows.

    Keeps a reference to the matrix: its bytes must not change before the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: PackedMatrix, activations: Activations) -> Tensor:
        """rows (T, K) -> (T, N)."""
        ctx.matrix = matrix
        return best_linear(rows, matrix, activations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the output (T, N) -> that of the rows, (T, K)."""
        return reference.linear_transposed(grad_outputs[0], ctx.matrix), None, None
