"""Least-Stale (Hoang et al., "SpecMD", arXiv 2602.03921): layers take turns, so it is known which come next.

Plain recency evicts the experts of the layers that come next, because their last turn was longest ago.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.base import register_policy
from transformers_moe_offload.policies.passes import Passes
from transformers_moe_offload.policies.unused_first import UnusedFirst


@register_policy("least_stale")
class LeastStale(UnusedFirst):
    """Three groups, the first to leave in front:

    1. stale: left from an earlier pass, and their layer has had its turn in this one without wanting them;
    2. current: used in this pass, so not needed before the next one;
    3. ahead: their layer's turn is still to come in this pass, and the last layer's leave first.

    For a layer that runs several times in a forward, its last run is its turn. Within a layer, the longest unused leave
    first. Every call takes O(1); finding the first candidate looks at each layer at most twice, however many residents
    there are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passes = Passes()
        self._older: dict[int, OrderedDict[ExpertId, None]] = {}
        """By layer: residents that its last visit did not use, by recency."""
        self._latest: dict[int, OrderedDict[ExpertId, None]] = {}
        """By layer: residents that its last visit used."""
        self._passed: dict[int, None] = {}
        """Layers that have had their turn in this pass, in order."""

    def begin(self, layer: int, wanted: Sequence[ExpertId]) -> None:
        """A layer's turn begins: the experts that its last visit used are older uses now."""
        if self._passes.begin(layer):
            self._passed = {}
        if self._passes.is_over(layer):
            self._passed[layer] = None
        if layer in self._latest:
            self._older[layer].update(self._latest[layer])
            self._latest[layer].clear()

    def use(self, expert: ExpertId) -> None:
        """A resident is being used."""
        self._unused.pop(expert, None)
        self._older.setdefault(expert.layer, OrderedDict()).pop(expert, None)
        latest = self._latest.setdefault(expert.layer, OrderedDict())
        latest[expert] = None
        latest.move_to_end(expert)

    def _forget_used(self, expert: ExpertId) -> None:
        if expert in self._latest[expert.layer]:
            del self._latest[expert.layer][expert]
        else:
            del self._older[expert.layer][expert]

    def _used(self) -> Iterator[ExpertId]:
        """The stale, then the current, then those ahead."""
        stale = chain.from_iterable(self._older.get(layer, ()) for layer in self._passed)
        current = chain.from_iterable(self._latest.get(layer, ()) for layer in self._passed)
        return chain(stale, current, self._ahead())

    def _ahead(self) -> Iterator[ExpertId]:
        for layer in sorted(self._older.keys() - self._passed.keys(), reverse=True):
            yield from self._older[layer]
            yield from self._latest[layer]
