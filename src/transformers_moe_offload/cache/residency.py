"""Know which expert is in which slot, and in what state. Bookkeeping only; nothing moves here.

absent ──start──▶ loading ──land──▶ resident ──evict──▶ absent
                     └──────fail──────────────────────────▲
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from transformers_moe_offload.expert import ExpertId


class Residency:
    """Slots and their experts. Every slot is free, or belongs to exactly one loading or resident expert."""

    def __init__(self, num_slots: int) -> None:
        self._numbers = set(range(num_slots))
        self._free = list(range(num_slots - 1, -1, -1))
        self._unused_numbers: list[int] = []
        self._slot_of: dict[ExpertId, int] = {}
        self._loading: set[ExpertId] = set()
        self._per_layer: Counter[int] = Counter()

    @property
    def num_slots(self) -> int:
        """All slots."""
        return len(self._numbers)

    @property
    def num_free(self) -> int:
        """Slots without an expert."""
        return len(self._free)

    def next_slot(self) -> int:
        """A number that was never used before or belongs to no slot any more."""
        return self._unused_numbers[-1] if self._unused_numbers else self.num_slots

    def add_slot(self) -> None:
        """One slot more, free, with the next number."""
        slot = self.next_slot()
        self._numbers.add(slot)
        if self._unused_numbers:
            self._unused_numbers.pop()
        self._free.append(slot)

    def remove_slot(self) -> int:
        """One free slot less."""
        slot = self._free.pop()
        self._numbers.remove(slot)
        self._unused_numbers.append(slot)
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
        self._loading.add(expert)  # first, so that it never counts as resident
        self._slot_of[expert] = slot
        self._per_layer[expert.layer] += 1
        return slot

    def land(self, expert: ExpertId) -> None:
        """A load has finished: the expert is resident."""
        self._loading.remove(expert)

    def fail(self, expert: ExpertId) -> None:
        """A load has failed: the expert is absent again and its slot free."""
        self._release(expert)
        self._loading.remove(expert)

    def evict(self, expert: ExpertId) -> None:
        """A resident leaves; its slot is free."""
        assert expert not in self._loading, f"{expert} is still loading"
        self._release(expert)

    def start_over(self) -> dict[int, ExpertId]:
        """After an interrupt in any of these methods: experts that were not resident become absent. Returns residents
        by slot.

        The set of slots, the slots of experts, and the set of loading experts are each changed by one atomic operation,
        in an order in which every slot that is marked resident holds its expert. The rest is derived.
        """
        self._slot_of = {expert: slot for expert, slot in self._slot_of.items() if expert not in self._loading}
        self._loading = set()
        held = {slot: expert for expert, slot in self._slot_of.items()}
        self._free = sorted(self._numbers.difference(held), reverse=True)
        past = max(self._numbers, default=0)
        self._unused_numbers = sorted(set(range(past)) - self._numbers, reverse=True)
        self._per_layer = Counter(expert.layer for expert in self._slot_of)
        return held

    def _release(self, expert: ExpertId) -> None:
        self._free.append(self._slot_of.pop(expert))
        self._per_layer[expert.layer] -= 1
