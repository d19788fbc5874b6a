"""Gradients through a forward that is not ours, over weights that do not stay.

What such a forward does with a weight cannot be known, so it is computed again in the backward pass. Even there
autograd would keep the weights of all experts; it is given a note of each one instead (`lending.py`), and one expert
at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformers_moe_offload.compute.lending import Lending

Session = Callable[..., AbstractContextManager[tuple[Callable[..., Tensor], Lending]]]
"""For some inputs: opens the experts that they want, and gives the function of these inputs and what lends weights to
it."""


def recompute_in_backward(session: Session, *inputs: Any) -> Tensor:
    """What the session's function makes of the inputs, differentiable in those that are floating-point tensors."""
    out = _Recompute.apply(session, *inputs)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, session: Session, *inputs: Any) -> Tensor:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.session = session
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
        with session(*inputs) as (compute, _):
            return compute(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[1:]
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved).detach().requires_grad_(needed) if is_tensor else other
            for is_tensor, needed, other in zip(ctx.is_tensor, needs_grad, ctx.others, strict=True)
        ]
        with ctx.session(*inputs) as (compute, lending):
            with torch.enable_grad(), ctx.autocast, ctx.random_state, lending.remembered():
                out = compute(*inputs)
            if not out.requires_grad:  # every pair was idle
                return (None,) * (1 + len(inputs))
            wanted = [value for value, needed in zip(inputs, needs_grad, strict=True) if needed]
            grads = iter(torch.autograd.grad(out, wanted, grad_outputs, allow_unused=True))
        return (None, *(next(grads) if needed else None for needed in needs_grad))


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
