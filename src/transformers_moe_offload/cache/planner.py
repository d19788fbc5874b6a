"""Decide which residents make room for the experts a layer is about to use.

Pure: reads a snapshot and returns a plan. `cache.py` carries the plan out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers_moe_offload.cache.residency import Residency
from transformers_moe_offload.expert import ExpertId


@dataclass(frozen=True)
class Load:
    """Bring `expert` in; `victim` leaves for it, or None where a slot is free."""

    expert: ExpertId
    victim: ExpertId | None


@dataclass(frozen=True)
class Plan:
    """Loads to start now, in this order, and experts that must wait until a slot can be spared."""

    loads: tuple[Load, ...]
    deferred: tuple[ExpertId, ...]


def plan(upcoming: Sequence[ExpertId], residency: Residency, candidates: Iterable[ExpertId], floor: int = 0) -> Plan:
    """Find slots for the absent ones among `upcoming`, which are in the order in which they will be used.

    Promises:
    - nobody in `upcoming` is a victim, except that when the very first one finds no room the upcoming resident that is
      needed last gives way (so that even one slot is enough to get through a layer);
    - no load takes another layer below `floor` slots;
    - each victim is resident and leaves once; loads never exceed the free slots plus victims.

    `candidates` are residents in the order in which the policy would let them go.
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


def _next_victim(
    leaving: Iterable[ExpertId],
    layer: int,
    needed: set[ExpertId],
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
