"""What the parts of a decode step take on this machine: all that a prediction knows of time. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

_HALVINGS = 30
"""Of the range in which the time to wake up is searched: then it is known to a billionth."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of one model in one format, token by token."""

    step_s: float
    """A step without its experts' modules."""
    expert_s: float
    """The arithmetic of one expert, for one token."""
    visit_s: float = 0.0
    """What a layer that has to load takes more than one that need not, beside its loads."""
    start_s: float = 0.0
    """Time of the computing thread for each load: it cannot be spent on arithmetic."""
    first_s: float = 0.0
    """From the start of a load to its landing, if no other is in flight."""
    next_s: float = 0.0
    """From the landing of a load to that of the next one, if that has begun meanwhile."""
    wake_s: float = 0.0
    """From the landing of a load that is waited for until the computing thread goes on."""

    def landing_s(self, begun_s: float, last_s: float) -> float:
        """When a load lands that begins at `begun_s`; `last_s` is when the one before it lands.

        Loads land in the order in which they begin. Either the latency of the way into the slots decides, or its
        bandwidth.
        """
        return max(begun_s + self.first_s, last_s + self.next_s)

    def arrival_s(self, now_s: float, lands_s: float) -> float:
        """When the computing thread has a load that lands then: at once if it has landed, else once it wakes up."""
        return now_s if lands_s <= now_s else lands_s + self.wake_s

    def layer_s(self, wanted: int, loads: int) -> float:
        """A layer's experts in one step, of which some have to be loaded and have slots: residents are computed while
        loads are in flight, then each one that has landed."""
        if not loads:
            return wanted * self.expert_s
        landings, last = [], float("-inf")
        for number in range(1, loads + 1):
            last = self.landing_s(self.visit_s + number * self.start_s, last)
            landings.append(last)
        now = self.visit_s + loads * self.start_s + (wanted - loads) * self.expert_s
        for lands in landings:
            now = self.arrival_s(now, lands) + self.expert_s
        return now


class Timing(NamedTuple):
    """A layer in one step."""

    wanted: int
    loads: int
    seconds: float
    own_s: float
    """Processor time of the computing thread."""


class Landings(NamedTuple):
    """Some loads that were started one after the other."""

    loads: int
    seconds: float
    """From when the first was on its way until all had landed."""


def fitted(step_s: float, timings: Sequence[Timing], landings: Sequence[Landings]) -> Costs:
    """The costs with which layers take the time that they took.

    Some of the layers must have had nothing to load. Latency and bandwidth are those of loads that were watched as they
    landed. What loads take of the computing thread is the line through its processor time, least squares over numbers
    of loads. What is left of the time is that of waking up.
    """
    kinds = sorted({(one.wanted, one.loads) for one in timings})
    all_kinds = [_Kind.of([one for one in timings if (one.wanted, one.loads) == kind]) for kind in kinds]
    resident = [kind for kind in all_kinds if kind.loads == 0 and kind.wanted]
    arithmetic_s = sum(kind.number * kind.seconds for kind in resident)
    expert_s = arithmetic_s / max(1, sum(kind.number * kind.wanted for kind in resident))
    loading = [kind for kind in all_kinds if kind.loads]
    if not loading or not landings:
        return Costs(step_s=step_s, expert_s=expert_s)
    visit_s, start_s = _line([(kind.number, kind.loads, kind.own_s - kind.wanted * expert_s) for kind in loading])
    first_s, next_s = _way(landings)
    costs = Costs(step_s=step_s, expert_s=expert_s, visit_s=visit_s, start_s=start_s, first_s=first_s, next_s=next_s)
    return replace(costs, wake_s=_wake_s(costs, loading))


class _Kind(NamedTuple):
    """Layers that want, and load, equally many experts: the medians of their times, which hold-ups do not change."""

    number: int
    wanted: int
    loads: int
    seconds: float
    own_s: float

    @classmethod
    def of(cls, alike: Sequence[Timing]) -> _Kind:
        first = alike[0]
        return cls(
            len(alike),
            first.wanted,
            first.loads,
            median(one.seconds for one in alike),
            median(one.own_s for one in alike),
        )


def _line(points: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """Intercept and slope, neither of them negative, of the line through values at numbers of loads, by weight."""
    weight = sum(count for count, _, _ in points)
    mean_x, mean_y = (sum(point[0] * point[i] for point in points) / weight for i in (1, 2))
    spread = sum(count * (x - mean_x) ** 2 for count, x, _ in points)
    slope = sum(count * (x - mean_x) * (y - mean_y) for count, x, y in points) / spread if spread else 0.0
    slope = min(max(slope, 0.0), max(mean_y, 0.0) / mean_x)
    return max(mean_y - slope * mean_x, 0.0), slope


def _way(landings: Sequence[Landings]) -> tuple[float, float]:
    """Latency, from loads that were alone, and seconds of each further one, from others."""
    first_s = median(one.seconds for one in landings if one.loads == 1)
    further = [(one.seconds - first_s) / (one.loads - 1) for one in landings if one.loads > 1]
    return first_s, max(0.0, median(further)) if further else first_s


def _wake_s(costs: Costs, loading: Sequence[_Kind]) -> float:
    """The time to wake up with which all layers together take as long as they took; 0 if they took less without it."""
    measured = sum(kind.number * kind.seconds for kind in loading)
    low, high = 0.0, max(kind.seconds for kind in loading)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = replace(costs, wake_s=middle)
        total = sum(kind.number * tried.layer_s(kind.wanted, kind.loads) for kind in loading)
        low, high = (middle, high) if total < measured else (low, middle)
    return low
