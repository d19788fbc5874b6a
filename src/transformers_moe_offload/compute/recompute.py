"""Gradients through weights that do not stay.

Autograd would keep every expert's weights until the backward pass, and they are views of slots that other experts
will have overwritten by then. So the forward pass keeps only its inputs, and the backward pass computes the layer
again with private copies of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recompute_in_backward(
    compute: Callable[..., Tensor], compute_with_copies: Callable[..., Tensor], *inputs: Any
) -> Tensor:
    """`compute(*inputs)`, differentiable in those inputs that are floating-point tensors.

    `compute_with_copies` must be the same function, with weights that stay unchanged until it is differentiated.
    """
    out = _Recompute.apply(compute, compute_with_copies, *inputs)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., Tensor], compute_with_copies: Callable[..., Tensor], *inputs: Any
    ) -> Tensor:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.compute_with_copies = compute_with_copies
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        device_type = tensors[0].device.type
        ctx.autocast = torch.autocast(
            device_type,
            dtype=torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type),
        )
        ctx.random_state = _RandomState(tensors[0].device)
        ctx.save_for_backward(*tensors)
        return compute(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[2:]
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved).detach().requires_grad_(needed) if is_tensor else other
            for is_tensor, needed, other in zip(ctx.is_tensor, needs_grad, ctx.others, strict=True)
        ]
        with torch.enable_grad(), ctx.autocast, ctx.random_state:
            out = ctx.compute_with_copies(*inputs)
        if not out.requires_grad:  # every pair was idle
            return (None,) * (2 + len(inputs))
        wanted = [value for value, needed in zip(inputs, needs_grad, strict=True) if needed]
        grads = iter(torch.autograd.grad(out, wanted, grad_outputs, allow_unused=True))
        return (None, None, *(next(grads) if needed else None for needed in needs_grad))


class _RandomState:
    """Draws the same random numbers again: some architectures have dropout inside their experts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        devices = [] if self._cuda is None else [self._device]
        self._fork = torch.random.fork_rng(devices)
        self._fork.__enter__()
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
