"""Measure how busy the link into the slots is, and so how many more loads it could carry."""

from __future__ import annotations

_SMOOTHING = 1 / 16
"""What a new value counts in a running mean: about the last 16 decide."""


class Link:
    """Running means over recent visits and loads. Several loads go on at once, so their times are shared out."""

    def __init__(self, num_lanes: int) -> None:
        self._num_lanes = num_lanes
        self._load = 0.0
        self._demand = 0.0
        self.quiet_visits = 0
        """Visits without loads since the last one that had some; the cache counts them."""

    def loaded(self, seconds: float) -> None:
        """A load took so much time."""
        self._load = seconds if self._load == 0.0 else self._load + _SMOOTHING * (seconds - self._load)

    def asked(self, num_loads: int) -> None:
        """A visit had to start so many loads."""
        self._settle()
        self._demand += _SMOOTHING * (num_loads - self._demand)

    @property
    def seconds_per_load(self) -> float:
        """Time that each further load takes; 0 until one has been measured."""
        return self._load / self._num_lanes

    def idle_seconds(self, period: float) -> float:
        """The part of `period`, the time between two visits, that demand leaves to other loads."""
        self._settle()
        return max(0.0, period - self._demand * self.seconds_per_load)

    def _settle(self) -> None:
        self._demand *= (1 - _SMOOTHING) ** self.quiet_visits
        self.quiet_visits = 0
