"""Read texts with a model token by token: what its layers want, and how long it takes."""

# S tokens of a text, N = S - 1 steps

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.bench.layers import files_of, sparse_layers, store_of
from transformers_moe_offload.bench.page_cache import can_drop, drop
from transformers_moe_offload.bench.session import unmap_dense
from transformers_moe_offload.routing.meter.steps import Meter, Steps
from transformers_moe_offload.tracing import Trace


@dataclass(frozen=True)
class Asked:
    """What an experts module was called with."""

    module: nn.Module
    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Recording:
    """Texts as a model reads them."""

    traces: list[Trace] = field(default_factory=list)
    asked: list[list[Asked]] = field(default_factory=list)
    """By text, one for each visit of its trace."""


def short_of_ram(model: Any) -> Callable[[], None]:
    """What to call before each step so that no expert is in the page cache, as if RAM were short.

    Experts that are read past the page cache are never in it. For others nothing can be done but on Linux.
    """
    plan = model.moe_offload.plan
    if plan.reads_past_cache or not can_drop() or all(pool.is_in_ram for pool in plan.pools):
        return lambda: None
    unmap_dense(model)
    files = files_of(store_of(model))
    return lambda: drop(files)


def read(
    model: Any,
    texts: Sequence[Tensor],
    before_step: Callable[[], None] = lambda: None,
    references: Sequence[Tensor] | None = None,
) -> list[tuple[Steps, Tensor]]:
    """The steps of each text (S,), read from an empty cache, and its log-probabilities (N, V).

    `references` are those that they are compared with, of the model as it is.
    """
    meter = Meter(model.eval(), before_step, lambda: None)
    return [meter.read(text, None if references is None else references[n]) for n, text in enumerate(texts)]


def record(model: Any, texts: Sequence[Tensor]) -> Recording:
    """What the layers are asked for, text by text."""
    found = Recording()
    for text in texts:
        calls: list[Asked] = []
        with model.moe_offload.trace() as trace, _calls(model, calls):
            read(model, [text])
        found.traces.append(trace)
        found.asked.append(calls)
    return found


@contextmanager
def _calls(model: Any, calls: list[Asked]) -> Iterator[None]:
    def note(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in args)
            calls.append(Asked(module, layer, kept, kwargs))

        return hook

    hooks = [
        module.register_forward_pre_hook(note(layer.index), with_kwargs=True) for module, layer in sparse_layers(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
