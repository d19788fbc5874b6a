"""How fast a model could be at best. Pure arithmetic.

With m experts missed per token, S bytes each, no reader can need less than `m * S / bandwidth` for a token, and no
arithmetic less than what it takes with every expert in the cache. Both can go on at once, so the limit is the larger.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Crossing(NamedTuple):
    """Bytes that have to pass through something, and how fast it lets them through."""

    nbytes: float
    bytes_per_s: float

    @property
    def seconds(self) -> float:
        """How long it takes at least."""
        return self.nbytes / self.bytes_per_s


def least_s(crossings: Iterable[Crossing], resident_s: float) -> float:
    """Seconds needed at least: for the slowest of the crossings, or for what it takes with every expert resident."""
    return max([resident_s, *(crossing.seconds for crossing in crossings)])
