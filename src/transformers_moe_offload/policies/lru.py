"""Least recently used: the resident that has gone unused for longest leaves first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy
from transformers_moe_offload.policies.unused_first import UnusedFirst


@register_policy("lru")
class LRU(UnusedFirst):
    """Recency order in one ordered dictionary; every operation is O(1)."""

    def __init__(self) -> None:
        super().__init__()
        self._by_recency: OrderedDict[ExpertId, None] = OrderedDict()

    def use(self, expert: ExpertId) -> None:
        """A resident is being used: it will be the last to leave."""
        self._unused.pop(expert, None)
        self._by_recency[expert] = None
        self._by_recency.move_to_end(expert)

    def _forget_used(self, expert: ExpertId) -> None:
        del self._by_recency[expert]

    def _used(self) -> Iterable[ExpertId]:
        return self._by_recency
