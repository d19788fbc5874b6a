"""Least frequently used, with decay: the resident with the fewest uses leaves first, and old uses count for less.

Alone, or with recency: the resident leaves first whose age divided by its number of uses is largest.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from math import log2
from operator import itemgetter

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy
from transformers_moe_offload.policies.passes import Passes
from transformers_moe_offload.policies.ranking import Ranking
from transformers_moe_offload.policies.unused_first import UnusedFirst

HALF_LIFE = 16
"""Forward passes after which a use counts half.

Hit rates of 1,099 forwards of `examples/models/tiny-moe` over prompts of three kinds, with slots for 10, 50 and 75 % of
the experts: half-life 4 passes 13, 69, 88 %; 16 passes 14, 70, 89 %; 64 passes 13, 69, 88 %; 256 passes 12, 67, 87 %;
without decay 12, 65, 86 %. LFRU with slots for 50 %: half-life 4 passes 68 %, 16 passes 69 %, 64 passes
68 %, without decay 68 %.
"""


@register_policy("lfu")
class LFU(UnusedFirst):
    """A ranking by decayed number of uses; a use takes O(log n).

    All numbers decay at one rate, so their order changes only at uses. A use at pass t is therefore counted as
    2^(t / HALF_LIFE) and nothing is ever scaled down; the logarithm of the sum is stored. It is kept when an expert is
    evicted, so an expert that is loaded again starts from its old number.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passes = Passes()
        self._num_uses = 0
        self._score: dict[ExpertId, float] = {}
        self._ranking = Ranking()

    def begin(self, layer: int, wanted: Sequence[ExpertId]) -> None:
        """A layer is about to use experts: a new pass may begin."""
        self._passes.begin(layer)

    def use(self, expert: ExpertId) -> None:
        """A resident is being used: it counts one more."""
        self._unused.pop(expert, None)
        self._num_uses += 1
        now = self._passes.count / HALF_LIFE
        before = self._score.get(expert)
        self._score[expert] = now if before is None else now + log2(1 + 2 ** (before - now))
        self._ranking.put(expert, (self._score[expert], self._num_uses))

    def _forget_used(self, expert: ExpertId) -> None:
        self._ranking.remove(expert)

    def _used(self) -> Iterable[ExpertId]:
        return self._ranking


NUM_CLASSES = 8
"""Classes of frequency: used about once, twice, 4, 8, ... times."""


@register_policy("lfru")
class LFRU(UnusedFirst):
    """Age divided by frequency, with frequency rounded to a power of two.

    The quotient of every resident changes with time, so it cannot be kept sorted; but among experts of one class of
    frequency the order is that of recency. Each class is an ordered dictionary, and the candidates are the classes
    merged. A use is O(1), a candidate O(log NUM_CLASSES). Numbers of uses are kept when experts are evicted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passes = Passes()
        self._num_visits = 0
        self._uses: dict[ExpertId, tuple[float, int]] = {}
        """Decayed number of uses, and the pass of the last one."""
        self._class_of: dict[ExpertId, int] = {}
        self._classes: list[OrderedDict[ExpertId, int]] = [OrderedDict() for _ in range(NUM_CLASSES)]
        """By recency, with the visit of the last use."""

    def begin(self, layer: int, wanted: Sequence[ExpertId]) -> None:
        """A layer is about to use experts: all residents age by one visit."""
        self._passes.begin(layer)
        self._num_visits += 1

    def use(self, expert: ExpertId) -> None:
        """A resident is being used: its age is zero, and it may move up a class."""
        self.forget(expert)
        now = self._passes.count
        uses, last = self._uses.get(expert, (0.0, now))
        uses = 1 + uses * 2 ** ((last - now) / HALF_LIFE)
        self._uses[expert] = uses, now
        self._class_of[expert] = min(round(log2(uses)), NUM_CLASSES - 1)
        self._classes[self._class_of[expert]][expert] = self._num_visits

    def _forget_used(self, expert: ExpertId) -> None:
        del self._classes[self._class_of[expert]][expert]

    def _used(self) -> Iterator[ExpertId]:
        """Oldest for their frequency first."""
        by_class = [self._aged(number) for number in range(NUM_CLASSES)]
        return (expert for _, expert in heapq.merge(*by_class, key=itemgetter(0)))

    def _aged(self, number: int) -> Iterator[tuple[float, ExpertId]]:
        """The experts of a class, oldest first, each with its negative age divided by the class's frequency."""
        for expert, visit in self._classes[number].items():
            yield (visit - self._num_visits) / 2**number, expert
