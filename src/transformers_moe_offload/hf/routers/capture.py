"""See which experts a sparse layer chooses for some tokens, without computing any expert."""

# T tokens, H hidden

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from transformers_moe_offload.hf.layouts import ExpertsLayout
from transformers_moe_offload.system.free_memory import is_out_of_memory

logger = logging.get_logger(__name__)

_is_asking: ContextVar[bool] = ContextVar("_is_asking", default=False)


def is_asking() -> bool:
    """Whether a router runs only to be asked here, and not because the model does: nothing of it is to be recorded."""
    return _is_asking.get()


@contextmanager
def _asking() -> Iterator[None]:
    token = _is_asking.set(True)
    try:
        yield
    finally:
        _is_asking.reset(token)


class Choices(NamedTuple):
    """What a block did with some tokens."""

    reached: Tensor
    """(T, H): what reached its experts."""
    experts: list[list[int]]
    """Those that each token was given to."""


def choices_of_block(
    block: nn.Module, experts: nn.Module, layout: ExpertsLayout, num_experts: int, hidden: Tensor
) -> Choices | None:
    """Run a block up to its experts: hidden (T, H); None where it needs more than hidden states."""
    try:
        calls = _calls_by_token(block, experts, hidden)
        reached = torch.cat([inputs[0].flatten(0, -2)[:1] for inputs in calls])
        return Choices(reached, [layout.wanted(num_experts, *inputs) for inputs in calls])
    except _CANNOT_RUN as error:
        _explain(block, error)
        return None


def choices_of_router(router: nn.Module, hidden: Tensor) -> list[list[int]] | None:
    """The experts that a router names for hidden (T, H); None where it answers in a way that we do not know."""
    try:
        with _asking():
            outputs = router(hidden)
    except _CANNOT_RUN as error:
        _explain(router, error)
        return None
    indices = [out for out in outputs if isinstance(out, Tensor) and not out.is_floating_point()]
    if len(indices) != 1 or len(indices[0]) != len(hidden):
        return None
    return indices[0].tolist()


def _calls_by_token(block: nn.Module, experts: nn.Module, hidden: Tensor) -> list[tuple[Any, ...]]:
    """What the experts are called with for each token of hidden (T, H)."""
    inputs = _inputs_of_experts(block, experts, hidden[None])
    if all(isinstance(tensor, Tensor) for tensor in inputs):
        rows = [tensor if len(tensor) == len(hidden) else tensor.flatten(0, -2) for tensor in inputs]
        if all(len(tensor) == len(hidden) for tensor in rows):
            return list(zip(*(tensor.split(1) for tensor in rows), strict=True))
    return [_inputs_of_experts(block, experts, token[None]) for token in hidden.split(1)]


_CANNOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)
"""What a module raises that needs more than a token's hidden states, such as positions or token ids."""


def _explain(module: nn.Module, error: Exception) -> None:
    """Log once why a module cannot be asked; that there is no memory left is no reason of its own."""
    if is_out_of_memory(error):
        raise error
    logger.info_once(f"{type(module).__name__} cannot be asked what it chooses: {type(error).__name__}: {error}")


class _ReachedExpertsError(Exception):
    """Carries the inputs of the experts out of the block."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.inputs = inputs


def _inputs_of_experts(block: nn.Module, experts: nn.Module, hidden: Tensor) -> tuple[Any, ...]:
    """Run a block as far as its experts: hidden (1, N, H) -> the arguments that the experts get."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _ReachedExpertsError(args + tuple(kwargs.values()))

    hook = experts.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with _asking():
            block(hidden)
    except _ReachedExpertsError as reached:
        return reached.inputs
    finally:
        hook.remove()
    raise RuntimeError("the block does not call its experts")
