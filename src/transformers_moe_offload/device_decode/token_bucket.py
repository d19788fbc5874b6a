"""Decide how many experts may be loaded between two forwards, behind a device that does not wait for them. Pure.

Absent experts are read over the same link meanwhile, and copies must not slow that down. So copies get the time of the
link that demand leaves, and a little more: without it, a link that is always busy would stay so, because no expert
would become resident for the next time.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from transformers_moe_offload.cache.bandwidth import Link

LEAST_SHARE = 1 / 8
"""Least share of the time for copies, however busy the link is: a step may lose so much to make later ones faster. An
expert that is used again within eight steps has then paid for itself."""

MOST_WAITING = 2
"""Most copies in flight until it is known how long one takes."""

RECENT = 8
"""Forwards whose median time is taken for the time of one, so that a prompt or a pause gives no time for hundreds of
copies."""


class Pace:
    """A token bucket of time that copies may take, filled up at every forward."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._credit = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def step(self, seconds: float, num_missed: int) -> None:
        """A forward began so long after the one before, and read so many absent experts over the link."""
        self._recent.append(seconds)
        period = median(self._recent)
        self._link.asked(num_missed)
        self._credit += max(LEAST_SHARE * period, self._link.idle_seconds(period))
        self._credit = min(self._credit, max(period, self._link.seconds_per_load))

    def most_loads(self, num_under_way: int) -> int:
        """How many more copies there is time for."""
        cost = self._link.seconds_per_load
        return int(self._credit / cost) if cost else max(0, MOST_WAITING - num_under_way)

    def started(self) -> None:
        """A copy was started."""
        self._credit -= self._link.seconds_per_load
