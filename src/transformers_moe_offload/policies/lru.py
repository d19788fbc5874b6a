"""Least recently used: the resident that has gone unused for longest leaves first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy


@register_policy("lru")
class LRU:
    """Recency order in one ordered dictionary; every operation is O(1)."""

    def __init__(self) -> None:
        self._by_recency: OrderedDict[ExpertId, None] = OrderedDict()

    def admit(self, expert: ExpertId) -> None:
        """An expert has become resident: it counts as just used."""
        self._by_recency[expert] = None

    def use(self, expert: ExpertId) -> None:
        """A resident is being used: it will be the last to leave."""
        self._by_recency.move_to_end(expert)

    def forget(self, expert: ExpertId) -> None:
        """A resident has left."""
        del self._by_recency[expert]

    def candidates(self) -> Iterator[ExpertId]:
        """Residents, longest unused first."""
        return iter(self._by_recency)
