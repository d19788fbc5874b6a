"""Load experts before a layer asks for them, while the link would be idle.

Which layers a forward comes to next, and in what order, is taken from the last forward. Most models run their sparse
layers in order and once in a forward. Some run a few of them several times, and the steps of a decoder leave its
encoder out.
"""

# T tokens, H hidden

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from torch import Tensor

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.cache.turn import Attempt, IsTakenError
from transformers_moe_offload.policies.passes import Passes
from transformers_moe_offload.prefetch.controller import Controller
from transformers_moe_offload.prefetch.predictors import Prediction, Predictor

_MOST_TURNS = 64
"""Turns of a layer in one forward that are followed: a bound for memory where no forward seems to end."""

_FEW_TOKENS = 8
"""A decode step of a small batch."""

_SMOOTHING = 1 / 16
"""What a new period counts in the running mean of them: about the last 16 decide."""


class Route:
    """Follows the visits of a model's sparse layers, which are numbered by their place in the model."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._passes = Passes(num_layers - 1)
        self._before: list[int] = []
        """The places of the last complete forward, in order."""
        self._now: list[int] = []
        """Those of this one so far."""

    def visit(self, place: int) -> bool:
        """A layer is visited; returns whether a forward begins with it."""
        is_first = self._passes.begin(place) or not self._now
        if is_first:
            self._before, self._now = self._now, []
        if len(self._now) < _MOST_TURNS * self._num_layers:
            self._now.append(place)
        return is_first

    def ahead(self, most: int) -> dict[int, int]:
        """The next few places after the one that is visited, each once, with the number of visits until then.

        The places of the next forward follow the last of this one. If this forward differs from the last, or the last
        was interrupted, layers are expected in the order of the model.
        """
        place, num_visits = self._now[-1], len(self._now)
        is_like_the_last = self._before[:num_visits] == self._now
        as_before = [*self._before[num_visits:], *self._before] if is_like_the_last else []
        order = [*as_before, *((place + step) % self._num_layers for step in range(1, self._num_layers))]
        found: dict[int, int] = {}
        for visits, other in enumerate(order, start=1):
            if len(found) == most:
                break
            if other != place:
                found.setdefault(other, visits)
        return found


class Prefetcher:
    """Watches a model's sparse layers and keeps some loads ahead of them. Serves one thread at a time.

    Only for forwards of few tokens: a prompt wants most of a layer's experts, so there is nothing to predict.
    """

    def __init__(
        self,
        predictor: Predictor,
        caches: Mapping[int, ExpertCache],
        *,
        lookahead: int,
        min_confidence: float,
        max_bytes: int | None = None,
        record_bytes: Mapping[int, int],
        controller: Callable[[], Controller] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`caches` by sparse layer, in the order in which a token passes them; `record_bytes` of one expert of each.

        `max_bytes` bounds what is started for one layer; None leaves it to the link's idle time. `controller` makes one
        for every number of tokens that steps have, because prefetching may pay for one number and not for another;
        without it prefetching is always on.
        """
        self._predictor = predictor
        self._caches = dict(caches)
        self._layers = list(caches)
        self._place = {layer: place for place, layer in enumerate(self._layers)}
        self._route = Route(len(self._layers))
        self._lookahead = min(lookahead, len(self._layers) - 1)
        self._min_confidence = min_confidence
        self._max_bytes = max_bytes
        self._record_bytes = record_bytes
        self._new_controller = controller
        self._controllers: dict[int, Controller] = {}
        self._clock = clock
        self._step_began: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None
        """When the latest visit began, and of which layer in order."""
        self._busy = threading.Lock()
        self._period = 0.0

    def is_on(self, num_tokens: int) -> bool:
        """Whether loads are started ahead, at present, in steps of so many tokens."""
        controller = self._controller(num_tokens)
        return num_tokens <= _FEW_TOKENS and (controller is None or controller.is_on)

    def visited(self, layer: int, wanted: Sequence[int], hidden: Tensor | None, num_tokens: int) -> None:
        """A layer has begun a visit and started its own loads; hidden (T, H) is what reached it."""
        with suppress(IsTakenError), Attempt(self._busy):  # taken: by another thread's visit, of another cache
            self._measure(layer, num_tokens)
            self._predictor.observe(layer, wanted)
            if self.is_on(num_tokens):
                self._look_ahead(layer, hidden)

    def _look_ahead(self, layer: int, hidden: Tensor | None) -> None:
        ahead = {self._layers[place]: visits for place, visits in self._route.ahead(self._lookahead).items()}
        targets = [target for target in ahead if not self._caches[target].holds_all(target)]
        if targets:
            self._start(ahead, self._predictor.predict(layer, targets, hidden))

    def _start(self, ahead: Mapping[int, int], predictions: Sequence[Prediction]) -> None:
        """Start predicted loads, the most confident first, that can begin before their layer is reached, until the
        link's idle time is spent.

        A correct prediction costs no idle time, because it replaces the same load on demand; so each prediction is
        charged (1 - confidence) of a load. Predicted experts are never evicted for other predictions, whatever their
        confidence: demand would not have evicted them.

        `ahead` is the number of visits until each layer's.
        """
        guessed = {expert for expert, _ in predictions}
        wasted_seconds, spent_bytes = 0.0, 0
        for expert, confidence in predictions:
            cache, nbytes = self._caches[expert.layer], self._record_bytes[expert.layer]
            if confidence < self._min_confidence or not cache.is_absent(expert):
                continue
            time_left = self._period * ahead[expert.layer]
            if cache.num_loading * cache.link.seconds_per_load > time_left:
                continue
            spent_bytes += nbytes
            wasted_seconds += (1 - confidence) * cache.link.seconds_per_load
            if wasted_seconds > cache.link.idle_seconds(self._period) or spent_bytes > (self._max_bytes or spent_bytes):
                return
            if not cache.load_ahead(expert, guessed):
                return

    def _measure(self, layer: int, num_tokens: int) -> None:
        """Measure the time between a layer and the next one, and from step to step."""
        now, place = self._clock(), self._place[layer]
        if self._route.visit(place):
            self._step_is_over(now, num_tokens)
        elif self._last is not None and self._last[1] == place - 1 and num_tokens <= _FEW_TOKENS:
            self._period += _SMOOTHING * (now - self._last[0] - self._period)
        self._last = (now, place)

    def _step_is_over(self, now: float, num_tokens: int) -> None:
        """Tell the controller of the step before how long it took, unless a prompt comes next: the time before a prompt
        may be a pause of the user.

        The next step may have another number of tokens: in assisted decoding it often has.
        """
        if self._step_began is not None and num_tokens <= _FEW_TOKENS:
            began, tokens_before = self._step_began
            controller = self._controller(tokens_before)
            if controller is not None:
                controller.took(now - began)
        self._step_began = (now, num_tokens)

    def _controller(self, num_tokens: int) -> Controller | None:
        """The controller for steps of so many tokens; None for prompts, or if prefetching is always on."""
        if self._new_controller is None or num_tokens > _FEW_TOKENS:
            return None
        if num_tokens not in self._controllers:
            self._controllers[num_tokens] = self._new_controller()
        return self._controllers[num_tokens]
