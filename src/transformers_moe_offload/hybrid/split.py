"""Decide which absent experts are moved to the accelerator, and which the host computes where they are. Pure.

The link and the host work at the same time, so a split takes as long as the slower of the two.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

MOST_PAIRS = 64
"""(token, choice) pairs that may ask for absent experts: a decode step of a small batch. More pairs are a prompt, for
which the accelerator computes many tokens at once with an expert that was moved, and fast."""

WORTHWHILE = 0.2
"""Part of the time of fetching that the host must save before it is used by default: its results are not bit for bit
those of the accelerator."""


@dataclass(frozen=True)
class MissRates:
    """Measured times of serving the absent experts of one sparse layer."""

    fetch_s: float
    """Seconds for which each expert that is moved keeps the link busy."""
    expert_s: float
    """Seconds that the host takes for an expert and one token: as a rule, to read the weights."""
    row_s: float
    """Seconds that the host takes for each further token of the same expert."""
    trip_s: float
    """Seconds for the tokens to the host and back, whatever it computes."""

    def host_s(self, num_tokens: int) -> float:
        """Seconds that the host takes for an expert that so many tokens want."""
        return self.expert_s + self.row_s * (num_tokens - 1)


def split(
    tokens: Mapping[int, int], rates: MissRates, at_hand: Container[int], loads_under_way: int = 0
) -> tuple[list[int], float]:
    """The fastest split of absent experts, each with the number of tokens that want it, those worth keeping last.

    Returns those that the host computes, in that order, and how many seconds the slower side takes by the rates; the
    others are moved.

    Only experts `at_hand`, in host memory, can be computed there; the others have to be read from disk first, which
    takes so long that it makes no difference where they go then. `loads_under_way` keep the link busy already.

    Of equally fast splits the one that moves most is taken, because moved experts may be resident next time. The
    experts that cost the host most are moved, and of equal ones those most worth keeping.
    """
    movable = [expert for expert in tokens if expert in at_hand]
    if sum(tokens.values()) > MOST_PAIRS:
        movable = []
    link_s = (loads_under_way + len(tokens) - len(movable)) * rates.fetch_s
    place = {expert: number for number, expert in enumerate(tokens)}
    movable.sort(key=lambda expert: (tokens[expert], place[expert]))  # the host computes the first ones
    best, num_computed, work_s = link_s + len(movable) * rates.fetch_s, 0, 0.0
    for number, expert in enumerate(movable, start=1):
        work_s += rates.host_s(tokens[expert])
        seconds = max(link_s + (len(movable) - number) * rates.fetch_s, rates.trip_s + work_s)
        if seconds < best:
            best, num_computed = seconds, number
    return sorted(movable[:num_computed], key=place.__getitem__), best


def pays(rates: MissRates, num_absent: int) -> bool:
    """Whether to use the host by default, where a token finds so many experts absent."""
    asked = dict.fromkeys(range(num_absent), 1)
    return split(asked, rates, asked)[1] < (1 - WORTHWHILE) * num_absent * rates.fetch_s
