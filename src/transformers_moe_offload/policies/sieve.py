"""SIEVE (Zhang et al., NSDI 2024): first in, first out, but experts used since the hand last passed stay a round."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy
from transformers_moe_offload.policies.unused_first import UnusedFirst


@register_policy("sieve")
class Sieve(UnusedFirst):
    """A queue by age with a mark on those used again, and a hand that goes from old to new and takes marks away.

    The queue is cut where the hand is. A use is O(1). An eviction moves the hand past the experts that were passed over
    for it: past a marked one once for each time it was marked, past an unmarked one only if the planner could not evict
    it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._behind: OrderedDict[ExpertId, bool] = OrderedDict()
        """From the oldest to the hand: whether each is marked."""
        self._ahead: OrderedDict[ExpertId, bool] = OrderedDict()
        """From the hand to the newest."""

    def use(self, expert: ExpertId) -> None:
        """A resident is being used: it joins the queue, or is marked."""
        if expert in self._unused:
            del self._unused[expert]
            self._ahead[expert] = False
        elif expert in self._ahead:
            self._ahead[expert] = True
        else:
            self._behind[expert] = True

    def _forget_used(self, expert: ExpertId) -> None:
        """The hand moves to its place."""
        has_left = False
        while not has_left:
            first, is_marked = self._ahead.popitem(last=False)
            has_left = first == expert and not is_marked
            if not has_left:
                self._behind[first] = False
            if not self._ahead:  # past the newest, the hand is at the oldest again, before another expert joins
                self._ahead, self._behind = self._behind, self._ahead

    def _used(self) -> Iterator[ExpertId]:
        """Those without a mark, then those with one, both as the hand would come to them."""
        for is_marked in (False, True):
            for part in (self._ahead, self._behind):
                yield from (expert for expert, mark in part.items() if mark == is_marked)
