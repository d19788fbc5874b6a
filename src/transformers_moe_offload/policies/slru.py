"""Segmented LRU: experts used once are on probation and leave before those that were used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy

PROTECTED_SHARE = 0.8
"""Most of the residents that may be protected at once. On the trace of `lfu.py`, with slots for 10, 50 and 75 % of the
experts: share 0.5 gives 11, 68, 88 % hits, 0.8 gives 10, 68, 88 %, 0.9 gives 9, 68, 89 %. Little depends on it."""


@register_policy("slru")
class SLRU:
    """Two recency orders; every operation is O(1).

    A second use protects an expert. When too many are protected, the one of them that has gone unused for longest is on
    probation again.
    """

    def __init__(self) -> None:
        self._unused: OrderedDict[ExpertId, None] = OrderedDict()
        self._on_probation: OrderedDict[ExpertId, None] = OrderedDict()
        self._protected: OrderedDict[ExpertId, None] = OrderedDict()

    def begin(self, layer: int, wanted: Sequence[ExpertId]) -> None:
        """A layer is about to use experts: nothing to do before `use`."""

    def admit(self, expert: ExpertId) -> None:
        """An expert has become resident."""
        self._unused[expert] = None

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

    def forget(self, expert: ExpertId) -> None:
        """A resident has left."""
        for segment in (self._unused, self._on_probation, self._protected):
            if expert in segment:
                del segment[expert]
                return

    def candidates(self) -> Iterator[ExpertId]:
        """Those never used, those on probation, those protected, each group longest unused first."""
        return chain(self._unused, self._on_probation, self._protected)
