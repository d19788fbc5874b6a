"""Decide which absent experts are loaded between two forwards, behind a device that waits for none, and how many. Pure.

Those missed most often lately come first. In the order of layers, the first layers would get all the copies, and the
last ones none. Simulated hit rates of 24 layers of 64 experts, 6 chosen, slots for 40 % and LRU, drawn routing (an
expert's chance falls with the 0.8th power of its rank, and 4 of 10 choices are the token's before): with 4 copies a
step, in order of layers 45 %, in turn 61 %, those missed most often first 65 %; with 16 copies 61, 68 and 68 %.

Absent experts are read over the same link meanwhile, and copies must not slow that down. So copies get the time of the
link that demand leaves, and a little more: without it, a link that is always busy would stay so, because no expert
would become resident for the next time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from transformers_moe_offload.cache.bandwidth import Link
from transformers_moe_offload.expert import ExpertId

HALF_LIFE = 16
"""Forwards after which a miss counts half, as a use does in `policies/lfu.py`."""

LEAST = 0.3
"""Smaller counts are dropped: one miss is, after two half-lives."""


class Urgency:
    """How often experts were missed lately."""

    def __init__(self) -> None:
        self._missed: dict[ExpertId, float] = {}
        self._num_forwards = 0
        self._latest = ExpertId(-1, -1)

    def missed(self, experts: Iterable[ExpertId]) -> None:
        """A forward has used these where they were."""
        for expert in experts:
            self._missed[expert] = self._missed.get(expert, 0.0) + 1
        self._num_forwards += 1
        if self._num_forwards % HALF_LIFE == 0:
            self._missed = {expert: count / 2 for expert, count in self._missed.items() if count / 2 >= LEAST}

    def first(self, absent: Iterable[ExpertId]) -> list[ExpertId]:
        """Absent experts in the order in which they should be loaded; experts with equal counts take turns."""
        return sorted(absent, key=lambda one: (-self._missed.get(one, 0.0), one <= self._latest, one))

    def started(self, expert: ExpertId) -> None:
        """An expert's load has started: its count of misses is reset."""
        self._missed.pop(expert, None)
        self._latest = expert


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
