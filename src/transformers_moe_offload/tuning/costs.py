"""What the parts of a decode step take on this machine: all that a prediction knows of time. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

_LENGTHS = 32
"""Lengths that are tried for the latency of a load, and for the time between two, in each of `_ROUNDS`."""
_ROUNDS = 3
"""Each on a grid that is finer by a factor of `_LENGTHS / 4`: after these, costs are known to a thousandth."""


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

    def landing_s(self, begun_s: float, last_s: float) -> float:
        """When a load lands that begins at `begun_s`; `last_s` is when the one before it lands.

        Loads land in the order in which they begin. Either the latency of the way into the slots decides, or its
        bandwidth.
        """
        return max(begun_s + self.first_s, last_s + self.next_s)

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
            now = max(now, lands) + self.expert_s
        return now


class Timing(NamedTuple):
    """A layer in one step."""

    wanted: int
    loads: int
    seconds: float
    own_s: float
    """Processor time of the computing thread."""


def fitted(step_s: float, timings: Sequence[Timing]) -> Costs:
    """The costs with which layers take the time that they took, least squares over their means.

    Some layers must have had nothing to load. What loads take of the computing thread is the line through its
    processor time; the rest of the time is the way into the slots, its latency and its bandwidth.
    """
    kinds = sorted({(one.wanted, one.loads) for one in timings})
    means = [_mean([one for one in timings if (one.wanted, one.loads) == kind]) for kind in kinds]
    at_rest = [mean for mean in means if mean.loads == 0 and mean.wanted]
    expert_s = _share(
        sum(mean.number * mean.seconds for mean in at_rest), sum(mean.number * mean.wanted for mean in at_rest)
    )
    costs = Costs(step_s=step_s, expert_s=expert_s)
    loading = [mean for mean in means if mean.loads]
    if not loading:
        return costs
    visit_s, start_s = _line([(mean.number, mean.loads, mean.own_s - mean.wanted * expert_s) for mean in loading])
    return _with_way(replace(costs, visit_s=visit_s, start_s=start_s), loading)


class _Mean(NamedTuple):
    number: int
    """Timings that it is the mean of."""
    wanted: int
    loads: int
    seconds: float
    own_s: float


def _mean(alike: Sequence[Timing]) -> _Mean:
    count = len(alike)
    seconds, own_s = sum(one.seconds for one in alike) / count, sum(one.own_s for one in alike) / count
    return _Mean(count, alike[0].wanted, alike[0].loads, seconds, own_s)


def _line(points: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """Intercept and slope, neither of them negative, of the line through values at numbers of loads, by weight."""
    weight = sum(count for count, _, _ in points)
    mean_x, mean_y = (sum(point[0] * point[i] for point in points) / weight for i in (1, 2))
    spread = sum(count * (x - mean_x) ** 2 for count, x, _ in points)
    slope = sum(count * (x - mean_x) * (y - mean_y) for count, x, y in points) / spread if spread else 0.0
    slope = min(max(slope, 0.0), max(mean_y, 0.0) / mean_x)
    return max(mean_y - slope * mean_x, 0.0), slope


def _with_way(costs: Costs, loading: Sequence[_Mean]) -> Costs:
    """Latency and bandwidth of loads, searched on finer and finer grids."""
    longest = max(mean.seconds for mean in loading)
    first, next_, width = longest / 2, longest / 2, longest
    for _ in range(_ROUNDS):
        step = width / _LENGTHS
        around = [(place - _LENGTHS // 2) * step for place in range(_LENGTHS + 1)]
        tried = [
            replace(costs, first_s=max(0.0, first + by), next_s=max(0.0, next_ + other))
            for by in around
            for other in around
        ]
        best = min(tried, key=lambda one: _error(one, loading))
        first, next_, width = best.first_s, best.next_s, 4 * step
    return best


def _error(costs: Costs, loading: Sequence[_Mean]) -> float:
    return sum(mean.number * (costs.layer_s(mean.wanted, mean.loads) - mean.seconds) ** 2 for mean in loading)


def _share(total: float, count: int) -> float:
    return total / count if count else 0.0
