"""Belady's oracle (1966): evict the resident whose next use is furthest ahead. For replays, whose trace holds it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.ranking import Ranking


class Belady:
    """A ranking by next use; a use takes O(log n).

    `visits` are the layer and the wanted experts of every visit that will be made, in order.
    """

    def __init__(self, visits: Iterable[tuple[int, Sequence[int]]]) -> None:
        self._visits_of: dict[ExpertId, list[int]] = {}
        self._num_visits = 0
        for layer, wanted in visits:
            for expert in wanted:
                self._visits_of.setdefault(ExpertId(layer, expert), []).append(self._num_visits)
            self._num_visits += 1
        self._now = -1
        self._ranking = Ranking()

    def begin(self, layer: int, wanted: Sequence[ExpertId]) -> None:
        """A layer is about to use experts: the next visit of the trace begins."""
        self._now += 1

    def admit(self, expert: ExpertId) -> None:
        """An expert has become resident, or is being used: it is ranked by its next use after this one."""
        visits = self._visits_of[expert]
        after = bisect_right(visits, self._now)
        next_use = visits[after] if after < len(visits) else self._num_visits
        self._ranking.put(expert, (-next_use, 0))

    use = admit

    def forget(self, expert: ExpertId) -> None:
        """A resident has left."""
        self._ranking.remove(expert)

    def candidates(self) -> Iterator[ExpertId]:
        """Residents: those never wanted again at the front, then the others, the furthest next use first."""
        return iter(self._ranking)
