"""Know which expert is in which slot, and in what state. Bookkeeping only; nothing moves here.

absent ──start──▶ loading ──land──▶ resident ──evict──▶ absent
                     └──────fail──────────────────────────▲
"""

from __future__ import annotations

from collections import Counter

from transformers_moe_offload.expert import ExpertId


class Residency:
    """Slots and their experts. Every slot is free, or belongs to exactly one loading or resident expert."""

    def __init__(self, num_slots: int) -> None:
        self._numbers = set(range(num_slots))
        self._free = list(range(num_slots - 1, -1, -1))
        self._unused_numbers: list[int] = []
        self.residents: dict[ExpertId, int] = {}
        """The experts that can be used now, with their slots. For reading: only the methods here change it."""
        self.loading: dict[ExpertId, int] = {}
        """The experts whose slots are still being filled, with these. For reading, too."""
        self._per_layer: Counter[int] = Counter()
        self.flags: dict[int, bytearray] = {}
        """A byte for each expert of some layers: 1 if it has a slot, resident or loading. See `keep_flags`."""

    def keep_flags(self, layer: int, num_experts: int) -> bytearray:
        """The flags of a layer, which are kept up to date from the first call on. For reading, too."""
        if layer not in self.flags:
            ids = (ExpertId(layer, expert) for expert in range(num_experts))
            self.flags[layer] = bytearray(not self.is_absent(expert) for expert in ids)
        return self.flags[layer]

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
        return expert in self.residents

    def is_loading(self, expert: ExpertId) -> bool:
        """Whether the expert has a slot that is still being filled."""
        return expert in self.loading

    def is_absent(self, expert: ExpertId) -> bool:
        """Whether the expert has no slot."""
        return expert not in self.residents and expert not in self.loading

    def slot(self, expert: ExpertId) -> int:
        """The slot of a loading or resident expert."""
        slot = self.residents.get(expert)
        return self.loading[expert] if slot is None else slot

    def count(self, layer: int) -> int:
        """How many slots a layer's experts have, loading ones included."""
        return self._per_layer[layer]

    def start(self, expert: ExpertId) -> int:
        """Give an absent expert a free slot to be loaded into."""
        assert self.is_absent(expert), f"{expert} already has a slot"
        slot = self.loading[expert] = self._free.pop()
        self._per_layer[expert.layer] += 1
        self._flag(expert, 1)
        return slot

    def land(self, expert: ExpertId) -> int:
        """A load has finished: the expert is resident. Returns its slot."""
        slot = self.residents[expert] = self.loading[expert]
        del self.loading[expert]
        return slot

    def fail(self, expert: ExpertId) -> None:
        """A load has failed: the expert is absent again and its slot free."""
        self._release(expert, self.loading.pop(expert))

    def evict(self, expert: ExpertId) -> None:
        """A resident leaves; its slot is free."""
        assert expert not in self.loading, f"{expert} is still loading"
        self._release(expert, self.residents.pop(expert))

    def start_over(self) -> dict[int, ExpertId]:
        """After an interrupt in any of these methods: experts that were not resident become absent. Returns residents
        by slot.

        The set of slots, the residents and the loading experts are each changed by one atomic operation, in an order in
        which every resident's slot holds it: one that has landed is a resident before it stops loading. The rest is
        derived.
        """
        self.loading.clear()
        held = {slot: expert for expert, slot in self.residents.items()}
        self._free = sorted(self._numbers.difference(held), reverse=True)
        past = max(self._numbers, default=0)
        self._unused_numbers = sorted(set(range(past)) - self._numbers, reverse=True)
        self._per_layer = Counter(expert.layer for expert in self.residents)
        for layer, flags in self.flags.items():
            flags[:] = bytes(ExpertId(layer, expert) in self.residents for expert in range(len(flags)))
        return held

    def _release(self, expert: ExpertId, slot: int) -> None:
        self._free.append(slot)
        self._per_layer[expert.layer] -= 1
        self._flag(expert, 0)

    def _flag(self, expert: ExpertId, has_slot: int) -> None:
        flags = self.flags.get(expert.layer)
        if flags is not None:
            flags[expert.expert] = has_slot
