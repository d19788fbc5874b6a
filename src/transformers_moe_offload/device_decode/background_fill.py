"""Fill a cache behind a device that uses experts wherever they are, in slots or over the link, and waits for none.

The device reports afterwards which experts its layers used, and which of them were resident. The policy is told of that
layer by layer, as of visits; absent experts are loaded for the next time, as far as the link has time for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.cache.change import change
from transformers_moe_offload.cache.planner import Load, plan_behind
from transformers_moe_offload.device_decode.fill_plan import Pace, Urgency
from transformers_moe_offload.expert import ExpertId


class FollowedCache(ExpertCache):
    """It is told afterwards which experts the device has used; `BackgroundFill` loads those that were absent."""

    @change
    def used_in_place(self, layer: int, wanted: Sequence[int], hits: Container[int]) -> None:
        """A device has used experts of a layer wherever they were: `hits` in slots, the others over the link."""
        stats, experts = self.stats[layer], [ExpertId(layer, expert) for expert in wanted]
        for expert in experts:
            if expert.expert in hits:
                stats.hits += 1
                if expert in self._ahead:
                    self._ahead.remove(expert)
                    stats.prefetch_used += 1
            else:
                stats.misses += 1
                stats.in_place += 1
                stats.device_bytes += self.slots.device_bytes(expert)
        self._policy.begin(layer, experts)
        if self.on_visit is not None:
            self.on_visit(layer, wanted)
        self.announce(expert for expert in experts if self.residency.is_resident(expert))

    def plan_behind(self, absent: Sequence[ExpertId], spared: Container[ExpertId]) -> list[Load]:
        """Slots for absent experts that a device has used in place; `spared` experts are not evicted for them."""
        return plan_behind(absent, self.residency, self._policy.candidates(), spared, self._floor)


@dataclass(frozen=True)
class Use:
    """What one layer used in one forward."""

    layer: int
    wanted: tuple[int, ...]
    """Its experts, in ascending order."""
    hits: frozenset[int]
    """Those of them that were resident; the others were read where they were."""


class BackgroundFill:
    """Loads experts into a cache that were absent when they were used."""

    def __init__(self, cache: FollowedCache, clock: Callable[[], float] = time.perf_counter) -> None:
        self._cache = cache
        self._pace = Pace(cache.link)
        self._urgency = Urgency()
        self._clock = clock
        self._last: float | None = None
        self._under_way: dict[ExpertId, None] = {}

    def receive(self) -> None:
        """Make experts resident whose loads have landed, and record the use that caused each load."""
        with self._cache.turn:
            self._cache.repair()
            for expert in list(self._under_way):
                if not self._cache.residency.is_loading(expert):  # a visit finished the load, or the load failed
                    del self._under_way[expert]
                elif self._cache.has_landed(expert):
                    self._cache.finish_load(expert)
                    self._cache.announce([expert])
                    del self._under_way[expert]

    def follow(self, forwards: Iterable[Sequence[Use]]) -> None:
        """Record the uses of some forwards, the latest one last, and start to load experts that were absent."""
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
            self._under_way[load.expert] = None  # first: `receive` removes it if the load was not started
            self._cache.start(load)
            self._pace.started()
            self._urgency.started(load.expert)

    def _measure(self, num_missed: int) -> None:
        now = self._clock()
        if self._last is not None:
            self._pace.step(now - self._last, num_missed)
        self._last = now
