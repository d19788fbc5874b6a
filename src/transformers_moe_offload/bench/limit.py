"""How fast a model could be at best. Pure arithmetic.

With m experts missed per token, S bytes each, reading takes at least `m * S / bandwidth` for a token, and arithmetic at
least as long as with every expert in the cache. Both can overlap, so the limit is the larger time.
Work that is faster than its limit refutes the limit: a bandwidth or a resident time was measured slower than it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ROUNDING = 0.005
"""Rounding error of shares in whole per cent."""


class Crossing(NamedTuple):
    """Bytes that have to pass through a link or a device, and its bandwidth."""

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
    """A share of a limit in per cent, as text; for an impossible share, that the limit was measured wrong."""
    return f"{min(share, 1):.0%}" if is_possible(share) else f"{of} measured wrong"
