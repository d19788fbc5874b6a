"""How fast a model could be at best. Pure arithmetic.

With m experts missed per token, S bytes each, no reader can need less than `m * S / bandwidth` for a token, and no
arithmetic less than what it takes with every expert in the cache. Both can go on at once, so the limit is the larger.
Work that is faster than its limit refutes the limit: a bandwidth or a resident time was measured slower than it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ROUNDING = 0.005
"""Of shares in whole per cent."""


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


def is_possible(share: float) -> bool:
    """Whether a share of a limit can be true, rounding aside."""
    return share < 1 + ROUNDING


def as_share(share: float, of: str = "limit") -> str:
    """A share of a limit in per cent, for people; where it cannot be, that what it is a share of was measured wrong."""
    return f"{min(share, 1):.0%}" if is_possible(share) else f"{of} measured wrong"
