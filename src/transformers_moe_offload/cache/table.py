"""Where the resident experts of a layer are, for code that computes with them without asking the cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.base import Slots
from transformers_moe_offload.store.layer_source import Weights

MOST_NOTED = 1024
"""Uses by tables after which the policy is told of them: a bound for memory."""


class ExpertTable(Protocol):
    """The residents of one sparse layer. The cache keeps it; it is read with the cache's turn held."""

    def put(self, expert: int, weights: Weights, until: float) -> None:
        """An expert is resident. From the time `until` on, in seconds of `time.monotonic`, it takes a visit to know
        whether it still is."""

    def keep_until(self, expert: int, until: float) -> None:
        """A visit has found a resident where it was."""

    def take_away(self, expert: int) -> None:
        """An expert is not resident any more."""


class Tables:
    """The tables of a cache's layers, and what was used by them since the policy was told of it."""

    def __init__(self, slots: Slots, num_experts: Mapping[int, int]) -> None:
        self.by_layer: dict[int, ExpertTable] = {}
        """Tables to be kept; none unless it is set before the first visit."""
        self.noted: list[tuple[int, Sequence[int]]] = []
        """Layers and the experts that they have used, all of them resident, in the order of a visit."""
        self._slots = slots
        self._num_experts = num_experts

    def put(self, expert: ExpertId, slot: int) -> None:
        """An expert has become resident in a slot."""
        if expert.layer in self.by_layer:
            until = time.monotonic() + self._slots.sure_for
            self.by_layer[expert.layer].put(expert.expert, self._slots.weights[slot], until)

    def take_away(self, expert: ExpertId) -> None:
        """An expert is about to be evicted."""
        if expert.layer in self.by_layer:
            self.by_layer[expert.layer].take_away(expert.expert)

    def keep(self, layer: int, wanted: Sequence[ExpertId]) -> None:
        """A visit has looked whether residents are where they were."""
        if layer in self.by_layer:
            until = time.monotonic() + self._slots.sure_for
            for expert in wanted:
                self.by_layer[layer].keep_until(expert.expert, until)

    def start_over(self, held: Mapping[int, ExpertId]) -> None:
        """Only these experts are resident, by slot."""
        for layer, table in self.by_layer.items():
            for number in range(self._num_experts[layer]):
                table.take_away(number)
        for slot, expert in held.items():
            self.put(expert, slot)

    def take_noted(self) -> list[tuple[int, Sequence[int]]]:
        """What was used since the last time that this was called."""
        noted, self.noted = self.noted, []
        return noted
