"""Least recently used: the resident that has gone unused for longest leaves first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy


@register_policy("lru")
class LRU:
    """Recency order in one ordered dictionary; every operation is O(1).

    An `OrderedDict`, because a plain dictionary finds its first entry only after skipping removed ones.
    """

    def __init__(self) -> None:
        self._unused: OrderedDict[ExpertId, None] = OrderedDict()
        self._by_recency: OrderedDict[ExpertId, None] = OrderedDict()

    def begin(self, layer: int, wanted: Sequence[ExpertId]) -> None:
        """A layer is about to use experts: nothing to do before `use`."""

    def admit(self, expert: ExpertId) -> None:
        """An expert has become resident."""
        self._unused[expert] = None

    def use(self, expert: ExpertId) -> None:
        """A resident is being used: it will be the last to leave."""
        self._unused.pop(expert, None)
        self._by_recency[expert] = None
        self._by_recency.move_to_end(expert)

    def forget(self, expert: ExpertId) -> None:
        """A resident has left."""
        if expert in self._unused:
            del self._unused[expert]
        else:
            del self._by_recency[expert]

    def candidates(self) -> Iterator[ExpertId]:
        """Those never used, then the others, longest unused first."""
        return chain(self._unused, self._by_recency)
