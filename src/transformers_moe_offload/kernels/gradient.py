"""Differentiate a product with a packed matrix: the rows have a gradient, the matrix is frozen."""

# T rows of input, N rows and K columns of the matrix

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformers_moe_offload.kernels import reference
from transformers_moe_offload.kernels.packed import PackedMatrix


class Linear(torch.autograd.Function):
    """`linear(rows, matrix, activations)`, differentiable in the rows.

    Keeps a reference to the matrix: its bytes must not change before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, matrix: PackedMatrix, activations: str, linear: Callable[..., Tensor]
    ) -> Tensor:
        """rows (T, K) -> (T, N)."""
        ctx.matrix = matrix
        return linear(rows, matrix, activations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the output (T, N) -> that of the rows, (T, K)."""
        return reference.linear_transposed(grad_outputs[0], ctx.matrix), None, None, None
