"""Time a model's layers and the rest of its steps, in steps as they are, and find the costs from that.

Not each part by itself in a loop: there, code and weights stay in the processor's caches, and an expert of 100 KiB
loads in two thirds of the time that it takes in a step (tiny-moe, two cores, 2026-12-01).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.bench.layers import sparse_layers
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hf.model.experts_module import offloaded
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.routing.meter.steps import Steps
from transformers_moe_offload.tuning.costs import Landings, Timing
from transformers_moe_offload.tuning.reading import Recording, read


@dataclass
class Timed:
    """Texts, read while every layer was timed."""

    steps: list[Steps] = field(default_factory=list)
    """Of each text."""
    layers: list[Timing] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """A step without its experts' modules, on average."""
        count = sum(len(one.seconds) for one in self.steps)
        return (sum(float(one.seconds.sum()) for one in self.steps) - sum(one.seconds for one in self.layers)) / count


def timed(model: Any, texts: Sequence[Tensor], before_step: Callable[[], None]) -> Timed:
    """Read texts, each from an empty cache."""
    found = Timed()
    with _watched(model, found.layers):
        found.steps += read(model, texts, before_step)
    return found


@contextmanager
def _watched(model: Any, layers: list[Timing]) -> Iterator[None]:
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
    """Load the experts that visits of a recording want, all at once, and see when each of them lands.

    The thread does not wait for them, which would add the time until it wakes up.
    """
    pairs = [
        pair
        for calls, trace in zip(recording.calls, recording.traces, strict=True)
        for pair in zip(calls, trace.visits, strict=True)
    ]
    found = []
    for call, visit in pairs[:: max(1, len(pairs) // MOST_WATCHED)][:MOST_WATCHED]:
        cache = offloaded(call.module).ready(call.inputs[0].device).experts.cache
        cache.clear()
        before()
        began = time.perf_counter()
        started = [one for one in (ExpertId(visit.layer, expert) for expert in visit.wanted) if cache.load_ahead(one)]
        landed = []
        with cache.turn:
            for expert in started:
                while not cache.has_landed(expert):
                    time.sleep(0)  # lets reader threads run
                landed.append(time.perf_counter())
            cache.settle()
        if landed:
            found.append(Landings(began, tuple(landed)))
    return found
