"""Keep experts sorted by a number that changes: a binary heap with the position of every expert in it."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from transformers_moe_offload.expert import ExpertId

Key = tuple[float, int]
"""The rank, and a number that decides between equal ranks."""


class Ranking:
    """Experts, smallest key first.

    Putting and removing take O(log n), and so does each further step of the iteration. Unlike with the usual lazy
    deletion, no stale entries are left for later steps to skip. Iterating changes nothing.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Key, ExpertId]] = []
        self._place: dict[ExpertId, int] = {}

    def __iter__(self) -> Iterator[ExpertId]:
        heap = self._heap
        front = [(heap[0], 0)] if heap else []
        while front:
            (_, expert), place = heapq.heappop(front)
            yield expert
            for child in range(2 * place + 1, min(2 * place + 3, len(heap))):
                heapq.heappush(front, (heap[child], child))

    def put(self, expert: ExpertId, key: Key) -> None:
        """Rank an expert by this key from now on."""
        if expert not in self._place:
            self._heap.append((key, expert))
            self._rise(len(self._heap) - 1, (key, expert))
        else:
            self._settle(self._place[expert], (key, expert))

    def remove(self, expert: ExpertId) -> None:
        """Remove an expert from the ranking."""
        place = self._place.pop(expert)
        last = self._heap.pop()
        if place < len(self._heap):
            self._settle(place, last)

    def _settle(self, place: int, entry: tuple[Key, ExpertId]) -> None:
        """Put an entry in the place of another one, and move it up or down to where it belongs."""
        if place and entry < self._heap[(place - 1) // 2]:
            self._rise(place, entry)
        else:
            self._sink(place, entry)

    def _rise(self, place: int, entry: tuple[Key, ExpertId]) -> None:
        heap = self._heap
        while place and entry < heap[parent := (place - 1) // 2]:
            self._set(place, heap[parent])
            place = parent
        self._set(place, entry)

    def _sink(self, place: int, entry: tuple[Key, ExpertId]) -> None:
        heap = self._heap
        while (child := 2 * place + 1) < len(heap):
            if child + 1 < len(heap) and heap[child + 1] < heap[child]:
                child += 1
            if entry < heap[child]:
                break
            self._set(place, heap[child])
            place = child
        self._set(place, entry)

    def _set(self, place: int, entry: tuple[Key, ExpertId]) -> None:
        self._heap[place] = entry
        self._place[entry[1]] = place
