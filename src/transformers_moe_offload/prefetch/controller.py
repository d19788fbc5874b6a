"""Find out by trying whether prefetching pays, and leave it off while it does not.

Loads ahead of demand take slots, and time of the link and the processor, so whether they help depends on the machine,
the model and the text. In a trial, steps with and without them take turns until it is clear which are faster; then that
way is kept until the next trial. Prefetching is kept only while it pays: once steps with it take longer than those
without it did in the trial, the next trial begins.

A trial compares pairs of neighbouring blocks, one of each way: a temporary slowdown of the machine slows both blocks of
a pair down, and if it hits only one of them, that pair stands out from the others instead of passing for a difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import chain
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


WARM_UP = 16
"""Steps with prefetching at the beginning of a trial that are not counted: the predictor learns only while it is asked,
and a cache that was empty fills up."""

BLOCK_STEPS = 5
"""Steps in a row with or without prefetching; the first still has loads of the block before and is not counted."""

ROUND = (False, True, True, False)
"""Whether the blocks of a round are done with prefetching: in this order, what gets steadily faster, such as a cache
that fills up, favours neither way."""

MOST_ROUNDS = 8
"""Most rounds of a trial. Differences that are not clear by then are worth less than a longer trial would cost: with
steps that vary by a tenth, a twentieth of a step."""

TRIAL_COST = 0.01
"""Part of the time until the next trial that a trial may have cost, by the steps that it did the slower way."""

SHORTEST_HOLD, LONGEST_HOLD = 300, 3000
"""Steps between two trials."""

WATCHED_STEPS = 50
"""Latest steps, whose median time is compared with that of steps without prefetching: a slowdown of the machine for
thirty steps (`with_hold_ups` in the tests) decides nothing."""

LEAST_GAIN = 0.01
"""Part of a step that prefetching must save to be kept."""


class Controller:
    """Gets the time of each step, and decides whether the next one is done with prefetching."""

    def __init__(self) -> None:
        self._steps = _steps()
        self.is_on = next(self._steps)

    def took(self, seconds: float) -> None:
        """A step is over."""
        self.is_on = self._steps.send(seconds)


def _steps() -> Generator[bool, float, None]:
    """Whether each step is to be done with prefetching; is sent how long it took."""
    while True:
        for _ in range(WARM_UP):
            yield True
        found, rounds, seconds_without = yield from _trial()
        pays = found.gain > LEAST_GAIN
        slower_steps = rounds * 2 * BLOCK_STEPS + (0 if pays else WARM_UP)
        hold = slower_steps * abs(found.gain) / TRIAL_COST
        yield from _hold(round(min(max(hold, SHORTEST_HOLD), LONGEST_HOLD)), pays, seconds_without)


def _hold(num_steps: int, is_on: bool, seconds_without: float) -> Generator[bool, float, None]:
    """Keep to one way for so many steps; to prefetching only while its steps are faster than those without it."""
    latest: deque[float] = deque(maxlen=WATCHED_STEPS)
    for step in range(num_steps):
        latest.append((yield is_on))
        is_due = step >= SHORTEST_HOLD - WATCHED_STEPS and step % WATCHED_STEPS == WATCHED_STEPS - 1
        if is_on and is_due and median(latest) > seconds_without:
            return


def _trial() -> Generator[bool, float, tuple[Comparison, int, float]]:
    """Rounds until the comparison is clear, or long enough; returns it, how many there were, and what a step without
    prefetching took."""
    blocks: dict[bool, list[list[float]]] = {True: [], False: []}
    rounds = 0
    while True:
        for is_on in ROUND:
            block: list[float] = []
            for step in range(BLOCK_STEPS):
                seconds = yield is_on
                if step:
                    block.append(seconds)
            blocks[is_on].append(block)
        rounds += 1
        found = Comparison.of(list(zip(blocks[False], blocks[True], strict=True)))
        if rounds == MOST_ROUNDS or found.is_clear(LEAST_GAIN):
            return found, rounds, median(chain.from_iterable(blocks[False]))
