"""Prefetching in a prediction: the prefetcher of a model, on the clock of the prediction."""

# H hidden

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.config import PrefetchConfig
from transformers_moe_offload.hf.model.lookahead import Lookahead
from transformers_moe_offload.tracing import Trace
from transformers_moe_offload.tuning.prediction import LooksAhead, Prefetching
from transformers_moe_offload.tuning.reading import Recording
from transformers_moe_offload.tuning.timed_slots import Clock


def prefetching(model: Any, config: PrefetchConfig, inputs: Sequence[Sequence[Tensor]]) -> Prefetching:
    """Prefetching of a model as configured. `inputs` (..., H) are those of the experts modules, by text and visit."""

    def make(caches: Mapping[int, ExpertCache], clock: Clock) -> LooksAhead:
        specs = {layer.index: model.moe_offload.spec(layer) for layer in model.moe_offload.layers}
        looking = Lookahead(model, config, caches, specs, clock=lambda: clock.now_s)
        return _OnClock(looking, inputs, clock)

    return make


class _OnClock:
    """Takes as much of the prediction's time as it really takes: guessing is done, and only loading is not."""

    def __init__(self, looking: Lookahead, inputs: Sequence[Sequence[Tensor]], clock: Clock) -> None:
        self._looking = looking
        self._inputs = inputs
        self._clock = clock

    def started(self, text: int, visit: int, layer: int) -> Callable[[Sequence[int]], None]:
        look_ahead = self._looking.started(layer, self._inputs[text][visit])

        def timed(wanted: Sequence[int]) -> None:
            began = time.perf_counter()
            with torch.inference_mode():
                look_ahead(wanted)
            self._clock.now_s += time.perf_counter() - began

        return timed


def inputs_of(recording: Recording) -> list[list[Tensor]]:
    """The hidden states that experts modules were called with, by text and visit: (T, H) each."""
    return [[call.inputs[0] for call in calls] for calls in recording.calls]


def stand_ins(model: Any, trace: Trace) -> list[list[Tensor]]:
    """Hidden states for a trace, which has none: zeros, for predictors that do not read them."""
    size = model.config.get_text_config().hidden_size
    by_tokens = {num_tokens: torch.zeros(max(1, num_tokens), size) for num_tokens in set(trace.step_tokens)}
    return [[by_tokens[trace.step_tokens[visit.step]] for visit in trace.visits]]
