"""Capture which experts a sparse layer chooses for some tokens, without computing any expert."""

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
    """Whether the current call of a router comes from this file and not from the model: it must not be recorded."""
    return _is_asking.get()


@contextmanager
def _asking() -> Iterator[None]:
    token = _is_asking.set(True)
    try:
        yield
    finally:
        _is_asking.reset(token)


class Choices(NamedTuple):
    """A block's choices for some tokens."""

    reached: Tensor
    """(T, H), the input of its experts."""
    experts: list[list[int]]
    """The experts chosen for each token."""


def choices_of_block(
    block: nn.Module, experts: nn.Module, layout: ExpertsLayout, num_experts: int, hidden: Tensor
) -> Choices | None:
    """Run a block up to its experts: hidden (T, H); None if it needs more than hidden states."""
    try:
        calls = _calls_by_token(block, experts, hidden)
        reached = torch.cat([inputs[0].flatten(0, -2)[:1] for inputs in calls])
        return Choices(reached, [layout.wanted(num_experts, *inputs) for inputs in calls])
    except _CANNOT_RUN as error:
        _explain(block, error)
        return None


def choices_of_router(router: nn.Module, hidden: Tensor) -> list[list[int]] | None:
    """The experts that a router returns for hidden (T, H); None if the form of its output is unknown."""
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
    """The arguments of the experts for each token of hidden (T, H)."""
    inputs = _inputs_of_experts(block, experts, hidden[None])
    if all(isinstance(tensor, Tensor) for tensor in inputs):
        rows = [tensor if len(tensor) == len(hidden) else tensor.flatten(0, -2) for tensor in inputs]
        if all(len(tensor) == len(hidden) for tensor in rows):
            return list(zip(*(tensor.split(1) for tensor in rows), strict=True))
    return [_inputs_of_experts(block, experts, token[None]) for token in hidden.split(1)]


_CANNOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)
"""Errors of modules that need more than a token's hidden states, such as positions or token ids."""


def _explain(module: nn.Module, error: Exception) -> None:
    """Log once why a module cannot be run on hidden states alone; raise the error again if memory ran out."""
    if is_out_of_memory(error):
        raise error
    logger.info_once(f"cannot run {type(module).__name__} on hidden states alone: {type(error).__name__}: {error}")


class _ReachedExpertsError(Exception):
    """Carries the inputs of the experts out of the block."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.inputs = inputs


def _inputs_of_experts(block: nn.Module, experts: nn.Module, hidden: Tensor) -> tuple[Any, ...]:
    """Run a block up to its experts: hidden (1, N, H) -> the arguments of the experts."""

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
