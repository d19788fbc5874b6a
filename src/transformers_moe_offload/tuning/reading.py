"""Read texts with a model token by token: what its layers want, how long it takes, and what it says of the text."""

# S tokens of a text, H hidden

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from transformers_moe_offload.bench.layers import files_of, sparse_layers, store_of
from transformers_moe_offload.bench.page_cache import can_drop, drop
from transformers_moe_offload.bench.session import unmap_dense
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.routing.meter.steps import Meter, Steps
from transformers_moe_offload.tracing import Trace


class Call(NamedTuple):
    """What an experts module was called with."""

    module: nn.Module
    layer: int
    inputs: tuple[Any, ...]
    """Hidden states (T, H), and what its router chose."""


@dataclass
class Recording:
    """Texts as a model reads them, one entry for each text."""

    traces: list[Trace] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    """One for each visit of the trace."""


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


def read(model: Any, texts: Sequence[Tensor], before_step: Callable[[], None]) -> list[Steps]:
    """The steps of each text (S,), read from an empty cache."""
    meter = Meter(model.eval(), before_step, lambda: None)
    return [meter.read(text, None)[0] for text in texts]


def record(model: Any, texts: Sequence[Tensor], before_step: Callable[[], None]) -> Recording:
    """What the layers are asked for, text by text."""
    found = Recording()
    for text in texts:
        calls: list[Call] = []
        with model.moe_offload.trace() as trace, _noted(model, calls):
            found.steps += read(model, [text], before_step)
        found.traces.append(trace)
        found.calls.append(calls)
    return found


@contextmanager
def _noted(model: Any, calls: list[Call]) -> Iterator[None]:
    """Append each call of an experts module."""
    hooks = [
        module.register_forward_pre_hook(_note(layer, calls), with_kwargs=True)
        for module, layer in sparse_layers(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _note(layer: SparseLayer, calls: list[Call]) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = layer.inputs(args, kwargs) if kwargs else args
        calls.append(
            Call(module, layer.index, tuple(one.clone() if isinstance(one, Tensor) else one for one in inputs))
        )

    return note
