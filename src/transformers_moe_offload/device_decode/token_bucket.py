"""Decide how many experts may be brought in between two forwards, behind a device that does not wait for them. Pure.

Absent experts are read over the same link meanwhile, and that must not take longer because of it. So copies get what
demand leaves of the link's time; and a little more, for a link that is busy all the time is busy because nothing comes
in that would be there next time.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from transformers_moe_offload.cache.bandwidth import Link

LEAST_SHARE = 1 / 8
"""Of the time, for copies, however busy the link is: what a step may lose for the sake of those after it. An expert
that is used again within eight steps has then paid for itself."""

MOST_WAITING = 2
"""Copies under way until it is known how long one takes."""

RECENT = 8
"""Forwards whose median is what one takes: after a prompt, or a pause, there is not suddenly time for hundreds."""


class Pace:
    """Time that copies may take, saved up from forward to forward."""

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
