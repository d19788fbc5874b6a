"""Least frequently and recently used: the resident leaves first whose age divided by its number of uses is largest."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import log2
from operator import itemgetter

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy
from transformers_moe_offload.policies.lfu import HALF_LIFE
from transformers_moe_offload.policies.passes import Passes
from transformers_moe_offload.policies.unused_first import UnusedFirst

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
