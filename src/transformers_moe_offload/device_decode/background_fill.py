"""Keep a cache behind a device that uses experts wherever they are, and waits for none.

The device says afterwards whom its layers used and who of them was resident. The policy hears of that as it does of
visits, layer by layer; absent experts are brought in for the next time, as far as the link has time for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.device_decode.miss_priority import Urgency
from transformers_moe_offload.device_decode.token_bucket import Pace
from transformers_moe_offload.expert import ExpertId


@dataclass(frozen=True)
class Use:
    """What one layer used in one forward."""

    layer: int
    wanted: tuple[int, ...]
    """Its experts, in ascending order."""
    hits: frozenset[int]
    """Those of them that were resident; the others were read where they were."""


class Follower:
    """Brings into a cache what was absent when it was used."""

    def __init__(self, cache: ExpertCache, clock: Callable[[], float] = time.perf_counter) -> None:
        self._cache = cache
        self._pace = Pace(cache.link)
        self._urgency = Urgency()
        self._clock = clock
        self._last: float | None = None
        self._under_way: dict[ExpertId, None] = {}

    def receive(self) -> None:
        """Those that have arrived are resident from now on, and were used last by what they were brought in for."""
        with self._cache.turn:
            self._cache.repair()
            for expert in list(self._under_way):
                if not self._cache.residency.is_loading(expert):  # a visit took it, or could not have it
                    del self._under_way[expert]
                elif self._cache.has_landed(expert):
                    self._cache.finish_load(expert)
                    self._cache.announce([expert])
                    del self._under_way[expert]

    def follow(self, forwards: Iterable[Sequence[Use]]) -> None:
        """Take note of some forwards, the latest one last, and start to bring in who was absent."""
        with self._cache.turn:
            self._cache.repair()
            absent: set[ExpertId] = set()
            spared: set[ExpertId] = set()
            for uses in forwards:
                for use in uses:
                    self._cache.used_in_place(use.layer, use.wanted, use.hits)
                missed = [ExpertId(use.layer, e) for use in uses for e in use.wanted if e not in use.hits]
                self._measure(len(missed))
                self._urgency.missed(missed)
                absent.update(missed)
                spared = {ExpertId(use.layer, expert) for use in uses for expert in use.wanted}
            self._bring_in([expert for expert in absent if self._cache.is_absent(expert)], spared)

    def _bring_in(self, absent: Sequence[ExpertId], spared: set[ExpertId]) -> None:
        most = self._pace.most_loads(len(self._under_way))
        if not absent or not most:
            return
        for load in self._cache.plan_behind(self._urgency.first(absent)[:most], spared):
            self._under_way[load.expert] = None  # first: one that was not started is found out by `receive`
            self._cache.start(load)
            self._pace.started()
            self._urgency.started(load.expert)

    def _measure(self, num_missed: int) -> None:
        now = self._clock()
        if self._last is not None:
            self._pace.step(now - self._last, num_missed)
        self._last = now
