"""Evict residents at random: the baseline that every other policy must beat."""

from __future__ import annotations

import random
from collections.abc import Iterator

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy
from transformers_moe_offload.policies.unused_first import UnusedFirst

SEED = 0


@register_policy("random")
class Random(UnusedFirst):
    """Residents in a list that is shuffled lazily, as far as the candidates are iterated; every operation is O(1).

    A new order is drawn after each eviction, from a fixed seed, so a run can be repeated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._experts: list[ExpertId] = []
        self._place: dict[ExpertId, int] = {}
        self._lots = random.Random(SEED)
        self._lot = self._lots.getrandbits(32)

    def use(self, expert: ExpertId) -> None:
        """A resident is being used: only the first use has an effect."""
        if expert in self._unused:
            del self._unused[expert]
            self._place[expert] = len(self._experts)
            self._experts.append(expert)

    def _forget_used(self, expert: ExpertId) -> None:
        """The last of the list takes its place."""
        last, place = self._experts.pop(), self._place.pop(expert)
        if last != expert:
            self._experts[place] = last
            self._place[last] = place
        self._lot = self._lots.getrandbits(32)

    def _used(self) -> Iterator[ExpertId]:
        """The shuffle of Fisher and Yates, one step at a time; it leaves the list unchanged."""
        lots, count = random.Random(self._lot), len(self._experts)
        moved: dict[int, int] = {}
        for place in range(count):
            drawn = lots.randrange(place, count)
            yield self._experts[moved.get(drawn, drawn)]
            moved[drawn] = moved.pop(place, place)
