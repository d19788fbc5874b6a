"""Predict how fast a model decodes with a cache: its trace is played through the cache of a model, against a clock.

Cache, visits, policies, floors and prefetching are those that a model runs with. Slots hold nothing; loads land and
arithmetic is done at the times that `Costs` has for them. So what overlaps here is what overlaps in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.policies import make_policy
from transformers_moe_offload.tracing import Trace, TraceError
from transformers_moe_offload.tuning.costs import Costs
from transformers_moe_offload.tuning.timed_slots import Clock, TimedSlots


@dataclass(frozen=True)
class Pool:
    """Layers that share slots."""

    layers: tuple[int, ...]
    num_slots: int


@dataclass(frozen=True)
class Prediction:
    """What a setting would do with some texts, step by step."""

    steps: int
    """Steps of one token; only these are counted."""
    seconds: float
    asked: int
    hits: int
    misses: int
    """Experts that had to be loaded because a layer asked for them."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens in a second."""
        return self.steps / self.seconds

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were resident."""
        return self.hits / self.asked if self.asked else 0.0


class LooksAhead(Protocol):
    """Starts loads ahead of demand in the caches of a prediction."""

    def started(self, text: int, visit: int, layer: int) -> Callable[[Sequence[int]], None]:
        """The callback of a visit, by the numbers of text, visit and layer, once its own loads are in flight."""


Prefetching = Callable[[Mapping[int, ExpertCache], Clock], LooksAhead]
"""Makes what looks ahead: from the caches by layer, and the clock."""


def single_steps(trace: Trace) -> set[int]:
    """The steps that decode one token; raises `TraceError` if there are none."""
    found = {step for step, num_tokens in enumerate(trace.step_tokens) if num_tokens == 1}
    if not found:
        raise TraceError(
            "the trace has no step of one token, and how fast tokens are decoded is what is predicted; record one "
            "sequence, generated token by token"
        )
    return found


def predict(
    texts: Sequence[Trace], pools: Sequence[Pool], policy: str, costs: Costs, prefetching: Prefetching | None = None
) -> Prediction:
    """Play the traces of some texts, each from an empty cache, and time the steps of one token.

    Prompts fill the cache and take no time: other arithmetic than that of `costs` is theirs.
    """
    clock = Clock()
    caches: dict[int, ExpertCache] = {}
    for pool in pools:
        num_experts = {layer: texts[0].num_experts[layer] for layer in pool.layers}
        cache = ExpertCache(TimedSlots(costs, clock), pool.num_slots, num_experts, make_policy(policy))
        caches |= dict.fromkeys(pool.layers, cache)
    ahead = None if prefetching is None else prefetching(caches, clock)
    steps, seconds, asked, hits, misses = 0, 0.0, 0, 0, 0
    for number, trace in enumerate(texts):
        for cache in set(caches.values()):
            cache.clear()
        singles = single_steps(trace)
        between_s = costs.step_s / _visits_of_a_step(trace, singles)
        for place, visit in enumerate(trace.visits):
            began_s, stats = clock.now_s, caches[visit.layer].stats[visit.layer]
            hits_before, misses_before = stats.hits, stats.misses
            clock.now_s += between_s
            started = None if ahead is None else ahead.started(number, place, visit.layer)
            _visit(caches[visit.layer], visit.layer, visit.wanted, costs, clock, started)
            if visit.step in singles:
                seconds += clock.now_s - began_s
                asked += len(visit.wanted)
                hits += stats.hits - hits_before
                misses += stats.misses - misses_before
        steps += len(singles)
    return Prediction(steps, seconds, asked, hits, misses)


def _visits_of_a_step(trace: Trace, singles: set[int]) -> float:
    """On average: where layers run several times in a step there are more than layers."""
    return sum(visit.step in singles for visit in trace.visits) / len(singles)


def _visit(
    cache: ExpertCache,
    layer: int,
    wanted: Sequence[int],
    costs: Costs,
    clock: Clock,
    started: Callable[[Sequence[int]], None] | None,
) -> None:
    """One layer's use of its experts: those that are available are computed while others land."""
    misses_before = cache.stats[layer].misses
    with cache.turn, cache.visit(layer, wanted, started) as visit:
        if cache.stats[layer].misses > misses_before:
            clock.now_s += costs.visit_s
        for batch in visit.batches():
            clock.now_s += costs.expert_s * len(batch)
