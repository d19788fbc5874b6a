"""Time a model's layers and the rest of its steps, in steps as they are, and find the costs from that.

Not each part by itself in a loop: there, code and weights stay in the processor's caches, and an expert of 100 KiB
loads in two thirds of the time that it takes in a step (tiny-moe, two cores, 2026-12-01).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transformers_moe_offload.bench.layers import sparse_layers
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hf.model.experts_module import offloaded
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.tuning.costs import Landings, Timing
from transformers_moe_offload.tuning.reading import Recording, read


class Timed(NamedTuple):
    """Texts, read twice, the second time with a clock at every layer."""

    step_s: float
    """A step without its experts' modules: the median, of each step of the first time less its modules of the second,
    because clocks take time as well."""
    layers: list[Timing]


def timed(model: Any, texts: Sequence[Tensor], before_step: Callable[[], None]) -> Timed:
    """Read texts, each from an empty cache."""
    whole = [seconds for one in read(model, texts, before_step) for seconds in one.seconds.tolist()]
    layers: list[Timing] = []
    ends: list[int] = []

    def next_step() -> None:
        ends.append(len(layers))
        before_step()

    with _clocks(model, layers):
        read(model, texts, next_step)
    bounds = zip(ends, [*ends[1:], len(layers)], strict=True)
    inside = [sum(one.seconds for one in layers[begin:end]) for begin, end in bounds]
    return Timed(median(step - part for step, part in zip(whole, inside, strict=True)), layers)


@contextmanager
def _clocks(model: Any, layers: list[Timing]) -> Iterator[None]:
    """Append a timing for each call of an experts module."""
    hooks = [hook for module, layer in sparse_layers(model) for hook in _hooks(module, layer, layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(module: nn.Module, layer: SparseLayer, layers: list[Timing]) -> list[Any]:
    """Hooks that time the calls of an experts module."""
    began: list[tuple[int, int, float, float]] = []

    def counts() -> tuple[int, int]:
        stats = offloaded(module).ready(layer.device).experts.cache.stats[layer.index]
        return stats.asked, stats.asked - stats.hits

    def before(*_: Any) -> None:
        began[:] = [(*counts(), time.thread_time(), time.perf_counter())]

    def after(*_: Any) -> None:
        seconds, own_s = time.perf_counter(), time.thread_time()
        asked_before, loads_before, own_before, seconds_before = began.pop()
        asked, loads = counts()
        layers.append(Timing(asked - asked_before, loads - loads_before, seconds - seconds_before, own_s - own_before))

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


@torch.inference_mode()
def at_rest(recording: Recording) -> list[Timing]:
    """The calls of a recording's first text again, twice each, of which the second is timed: what it wants is resident
    then, if there are slots for it.

    For models whose experts have no room in memory all together.
    """
    found = []
    for call, visit in zip(recording.calls[0], recording.traces[0].visits, strict=True):
        call.module(*call.inputs)
        began, own = time.perf_counter(), time.thread_time()
        call.module(*call.inputs)
        found.append(Timing(len(visit.wanted), 0, time.perf_counter() - began, time.thread_time() - own))
    return found


MOST_WATCHED = 64
"""Visits whose loads are watched: their median is known to a few per cent then."""


def watched(recording: Recording, before: Callable[[], None]) -> list[Landings]:
    """Load the first of the experts that a visit of a recording wants, then all of them, and see when they have landed.

    The thread does not wait for them, which would add the time until it wakes up.
    """
    calls = [call for text in recording.calls for call in text]
    visits = [visit for trace in recording.traces for visit in trace.visits]
    some = slice(0, None, max(1, len(calls) // MOST_WATCHED))
    found = []
    for call, visit in zip(calls[some], visits[some], strict=True):
        cache = offloaded(call.module).ready(call.inputs[0].device).experts.cache
        for count in sorted({min(1, len(visit.wanted)), len(visit.wanted)}):
            cache.clear()
            before()
            found += _landings(cache, [ExpertId(visit.layer, expert) for expert in visit.wanted[:count]])
    return found


def _landings(cache: ExpertCache, experts: Sequence[ExpertId]) -> list[Landings]:
    """How long experts take to land that are loaded ahead of demand; empty if none has a slot."""
    started, on_its_way = [], 0.0
    for expert in experts:
        if cache.load_ahead(expert):
            started.append(expert)
            on_its_way = on_its_way or time.perf_counter()
    with cache.turn:
        for expert in started:
            while not cache.has_landed(expert):
                time.sleep(0)  # lets reader threads run
        seconds = time.perf_counter() - on_its_way
        cache.settle()
    return [Landings(len(started), seconds)] if started else []
