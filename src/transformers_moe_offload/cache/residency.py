"""Know which expert is in which slot, and in what state. Bookkeeping only; nothing moves here.

absent ──start──▶ loading ──land──▶ resident ──evict──▶ absent
                     └──────fail──────────────────────────▲
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from transformers_moe_offload.expert import ExpertId


class Residency:
    """Slots and who is in them. Every slot is free, or belongs to exactly one loading or resident expert."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._unused_numbers: list[int] = []
        self._slot_of: dict[ExpertId, int] = {}
        self._loading: set[ExpertId] = set()
        self._per_layer: Counter[int] = Counter()

    @property
    def num_free(self) -> int:
        """Slots that belong to nobody."""
        return len(self._free)

    def add_slot(self) -> int:
        """One slot more, free; its number was never used before or belongs to no slot any more."""
        slot = self._unused_numbers.pop() if self._unused_numbers else self.num_slots
        self._free.append(slot)
        self.num_slots += 1
        return slot

    def remove_slot(self) -> int:
        """One free slot less."""
        slot = self._free.pop()
        self._unused_numbers.append(slot)
        self.num_slots -= 1
        return slot

    def is_resident(self, expert: ExpertId) -> bool:
        """Whether the expert can be used now."""
        return expert in self._slot_of and expert not in self._loading

    def is_loading(self, expert: ExpertId) -> bool:
        """Whether the expert has a slot that is still being filled."""
        return expert in self._loading

    def is_absent(self, expert: ExpertId) -> bool:
        """Whether the expert has no slot."""
        return expert not in self._slot_of

    def slot(self, expert: ExpertId) -> int:
        """The slot of a loading or resident expert."""
        return self._slot_of[expert]

    def count(self, layer: int) -> int:
        """How many slots a layer's experts have, loading ones included."""
        return self._per_layer[layer]

    def residents(self) -> Iterator[ExpertId]:
        """The experts that can be used now."""
        return (expert for expert in self._slot_of if expert not in self._loading)

    def start(self, expert: ExpertId) -> int:
        """Give an absent expert a free slot to be loaded into."""
        assert expert not in self._slot_of, f"{expert} already has a slot"
        slot = self._free.pop()
        self._slot_of[expert] = slot
        self._loading.add(expert)
        self._per_layer[expert.layer] += 1
        return slot

    def land(self, expert: ExpertId) -> None:
        """A load has finished: the expert is resident."""
        self._loading.remove(expert)

    def fail(self, expert: ExpertId) -> None:
        """A load has failed: the expert is absent again and its slot free."""
        self._loading.remove(expert)
        self._release(expert)

    def evict(self, expert: ExpertId) -> None:
        """A resident leaves; its slot is free."""
        assert expert not in self._loading, f"{expert} is still loading"
        self._release(expert)

    def _release(self, expert: ExpertId) -> None:
        self._free.append(self._slot_of.pop(expert))
        self._per_layer[expert.layer] -= 1
