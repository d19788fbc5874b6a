"""Compare the times of two ways that were tried in turns, and tell a difference from chance.

It compares pairs of neighbouring blocks, one of each way: a temporary slowdown of the machine slows both blocks of a
pair down, and if it hits only one of them, that pair stands out from the others instead of passing for a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log, sqrt
from statistics import median, stdev

CLEAR = 4.0
"""Standard errors that a clear difference exceeds. They are estimated from four pairs or more, and compared again each
time pairs are added, each time with another chance of a false result."""

_SHORTEST = 1e-9
"""Seconds: times that are no longer than this are taken for this, so that they have a logarithm."""


@dataclass(frozen=True)
class Comparison:
    """How much time the second way saves, on the scale of logarithms."""

    saved: float
    """Median over the pairs."""
    error: float
    """Standard error of the mean over the pairs; infinite with fewer than four."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Comparison:
        """Compare the times of blocks, each pair one of the first way and one of the second."""
        saved = [_typical(first) - _typical(second) for first, second in pairs]
        return cls(median(saved), stdev(saved) / sqrt(len(saved)) if len(saved) >= 4 else inf)

    @property
    def gain(self) -> float:
        """Part of the time that is saved; negative where the second way takes longer."""
        return 1 - exp(-self.saved)

    def is_clear(self, least_gain: float) -> bool:
        """Whether the gain is above, or below, `least_gain` by more than chance explains."""
        return abs(self.saved + log(1 - least_gain)) > CLEAR * self.error


def _typical(times: Sequence[float]) -> float:
    return log(max(median(times), _SHORTEST))
