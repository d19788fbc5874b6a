"""Decide which residents make room for the experts a layer is about to use.

Pure: reads a snapshot and returns a plan. `steps.py` carries the plan out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from transformers_moe_offload.cache.residency import Residency
from transformers_moe_offload.expert import ExpertId


@dataclass(frozen=True)
class Load:
    """Load `expert`; `victim` is evicted for it, None if a slot is free."""

    expert: ExpertId
    victim: ExpertId | None


@dataclass(frozen=True)
class Plan:
    """Loads to start now, in this order, and experts that must wait until a slot can be spared."""

    loads: tuple[Load, ...]
    deferred: tuple[ExpertId, ...]


def order_of_use(wanted: Sequence[ExpertId], residency: Residency, num_slots: int | None = None) -> list[ExpertId]:
    """The wanted experts in order of use: residents first, then loading ones, then absent ones.

    If they pass through `num_slots` in waves, residents among the last ones wanted are used last instead: they are
    worth keeping, and would be evicted if they were used first. Two slots are left to the others, one to compute from
    while the other is filled.
    """
    kept: set[ExpertId] = set()
    if num_slots is not None:
        worth_keeping = [expert for expert in wanted[-num_slots:] if residency.is_resident(expert)]
        kept = set(worth_keeping[-(num_slots - 2) :] if num_slots > 2 else ())

    def rank(expert: ExpertId) -> int:
        if expert in kept:
            return 3
        return 0 if residency.is_resident(expert) else 1 if residency.is_loading(expert) else 2

    return sorted(wanted, key=rank)


def plan(upcoming: Sequence[ExpertId], residency: Residency, candidates: Iterable[ExpertId], floor: int = 0) -> Plan:
    """Find slots for the absent ones among `upcoming`, which are in the order in which they will be used.

    Promises:
    - no expert in `upcoming` is a victim, with one exception: if there is no slot for the very first one, the upcoming
      resident that is needed last is evicted (so that even one slot is enough to get through a layer);
    - no load takes another layer below `floor` slots;
    - each victim is resident and leaves once; loads never exceed the free slots plus victims.

    `candidates` are residents in the policy's eviction order.
    """
    absent = [expert for expert in upcoming if residency.is_absent(expert)]
    if not absent:
        return Plan((), ())
    needed = set(upcoming)
    counts = Counter({layer: residency.count(layer) for layer in {expert.layer for expert in upcoming}})
    free = residency.num_free
    leaving = iter(candidates)
    loads: list[Load] = []
    deferred: list[ExpertId] = []
    for expert in absent:
        victim = None
        if free:
            free -= 1
        else:
            victim = _next_victim(leaving, expert.layer, needed, residency, counts, floor)
            if victim is None and expert == upcoming[0]:
                victim = next((e for e in reversed(upcoming) if residency.is_resident(e)), None)
            if victim is None:
                deferred.append(expert)
                continue
            counts[victim.layer] -= 1
        counts[expert.layer] += 1
        loads.append(Load(expert, victim))
    return Plan(tuple(loads), tuple(deferred))


def plan_ahead(
    expert: ExpertId, residency: Residency, candidates: Iterable[ExpertId], spared: Container[ExpertId], floor: int
) -> Load | None:
    """Find a slot for an absent expert ahead of demand; None if that would evict a spared one or break a floor."""
    if residency.num_free:
        return Load(expert, None)
    counts = Counter({expert.layer: residency.count(expert.layer)})
    victim = _next_victim(candidates, expert.layer, spared, residency, counts, floor)
    return Load(expert, victim) if victim is not None else None


def plan_behind(
    absent: Iterable[ExpertId],
    residency: Residency,
    candidates: Iterable[ExpertId],
    spared: Container[ExpertId],
    floor: int,
) -> list[Load]:
    """Find slots for absent experts of any layers, the first ones first; experts whose load would evict a spared one or
    break another layer's floor are left out.

    The candidates are iterated once. A candidate that its layer's floor protects is set aside, and is the first victim
    for a later expert of that layer.
    """
    counts: Counter[int] = Counter()
    free = residency.num_free
    leaving = (candidate for candidate in candidates if candidate not in spared)
    passed_over: dict[int, deque[ExpertId]] = {}
    loads: list[Load] = []

    def count(layer: int) -> int:
        if layer not in counts:
            counts[layer] = residency.count(layer)
        return counts[layer]

    def victim_for(layer: int) -> ExpertId | None:
        if passed_over.get(layer):
            return passed_over[layer].popleft()
        for candidate in leaving:
            if candidate.layer == layer or count(candidate.layer) > floor:
                return candidate
            passed_over.setdefault(candidate.layer, deque()).append(candidate)
        return None

    for expert in absent:
        victim = None
        if free:
            free -= 1
        else:
            victim = victim_for(expert.layer)
            if victim is None:
                continue
            counts[victim.layer] = count(victim.layer) - 1
        counts[expert.layer] = count(expert.layer) + 1
        loads.append(Load(expert, victim))
    return loads


def _next_victim(
    leaving: Iterable[ExpertId],
    layer: int,
    needed: Container[ExpertId],
    residency: Residency,
    counts: Counter[int],
    floor: int,
) -> ExpertId | None:
    """The first candidate that may leave for an expert of `layer`; candidates passed over are not offered again."""
    for candidate in leaving:
        if candidate in needed:
            continue
        if candidate.layer not in counts:
            counts[candidate.layer] = residency.count(candidate.layer)
        if candidate.layer == layer or counts[candidate.layer] > floor:
            return candidate
    return None
