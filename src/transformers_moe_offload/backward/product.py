"""Products whose weights are fetched again for the backward pass.

Autograd would keep every expert's weights until the backward pass, and they are views of slots that other experts will
have overwritten by then. So it keeps a callback that fetches them again: the backward pass borrows one expert after the
other, in the order in which autograd comes to them, and nothing is computed twice.
"""

# N rows

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformers_moe_offload.compute.mlp import ExpertMlp, ExpertWeights

Use = Callable[[ExpertWeights], Tensor]
"""Computes something with an expert's weights, and keeps none of them."""

Again = Callable[[Use], Tensor]
"""Fetches the expert whose weights a product had, and returns what is computed with it."""


def borrowed_product(mlp: ExpertMlp, rows: Tensor, weights: ExpertWeights, name: str, again: Again) -> Tensor:
    """rows (N, in) -> their product with one field of an expert, (N, out); differentiable in the rows."""
    out: Tensor = _BorrowedProduct.apply(rows, mlp, weights, name, again)  # type: ignore[no-untyped-call]
    return out


class _BorrowedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, mlp: ExpertMlp, weights: ExpertWeights, name: str, again: Again) -> Tensor:
        ctx.mlp, ctx.name, ctx.again, ctx.dtype = mlp, name, again, rows.dtype
        return mlp.project(rows, weights, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.again(lambda weights: ctx.mlp.gradient(grad_outputs[0], weights, ctx.name))
        return gradient.to(ctx.dtype), None, None, None, None
