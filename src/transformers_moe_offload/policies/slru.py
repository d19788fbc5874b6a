"""Segmented LRU: experts used once are on probation and leave before those that were used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy
from transformers_moe_offload.policies.unused_first import UnusedFirst

PROTECTED_SHARE = 0.8
"""Most of the residents that may be protected at once. On the trace of `lfu.py`, with slots for 10, 50 and 75 % of the
experts: share 0.5 gives 11, 68, 88 % hits, 0.8 gives 10, 68, 88 %, 0.9 gives 9, 68, 89 %. Little depends on it."""


@register_policy("slru")
class SLRU(UnusedFirst):
    """Two recency orders; every operation is O(1).

    A second use protects an expert. When too many are protected, the one of them that has gone unused for longest is on
    probation again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._on_probation: OrderedDict[ExpertId, None] = OrderedDict()
        self._protected: OrderedDict[ExpertId, None] = OrderedDict()

    def use(self, expert: ExpertId) -> None:
        """A resident is being used: on probation for the first time, protected from the second time on."""
        if expert in self._unused:
            del self._unused[expert]
            self._on_probation[expert] = None
            return
        self._on_probation.pop(expert, None)
        self._protected[expert] = None
        self._protected.move_to_end(expert)
        if len(self._protected) > PROTECTED_SHARE * (len(self._protected) + len(self._on_probation)):
            oldest, _ = self._protected.popitem(last=False)
            self._on_probation[oldest] = None

    def _forget_used(self, expert: ExpertId) -> None:
        del (self._protected if expert in self._protected else self._on_probation)[expert]

    def _used(self) -> Iterator[ExpertId]:
        return chain(self._on_probation, self._protected)
