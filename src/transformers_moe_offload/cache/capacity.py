"""Turn a budget in bytes into slots, and choose the experts that are loaded into them before the first forward.

Layers whose experts live on one device and have records of one size share a pool of slots; the budget is shared out
among the pools in proportion to the bytes of their experts. Single experts of a pool may have records of another size:
a slot is then as large as the record in it, and the number of slots is what fits with the largest records in them.
Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers_moe_offload.errors import CapacityError
from transformers_moe_offload.expert import ExpertId

D = TypeVar("D", bound=Hashable)
"""A device."""

FLOOR_SHARE = 1.0
"""Part of a layer's equal share of the slots that other layers cannot take from it.

Layers take turns, so the residents that have gone unused for longest belong to the layer that is needed next: without
a floor, LRU over all layers evicts exactly those. Hit rates of 600 sampled tokens of `examples/models/tiny-moe` (8
layers of 16 experts, 4 chosen) with slots for 10, 25, 50 and 75 % of the experts: no floor 0, 40, 64, 86 %; half the
share 0, 40, 64, 87 %; the whole share 9, 40, 69, 87 %. Only the slots that do not divide evenly float.
"""


@dataclass(frozen=True)
class PoolNeed:
    """What one pool would need to hold every expert of its layers."""

    num_layers: int
    num_experts: int
    """Experts of all the pool's layers together."""
    slot_bytes: int
    """Bytes of an expert's record."""
    others: tuple[tuple[int, int], ...] = ()
    """Other sizes of records, each with the number of experts that have it."""

    @property
    def all_bytes(self) -> int:
        """Bytes of slots for every expert."""
        return self.bytes_of(self.num_experts)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest record."""
        return self.bytes_of(1)

    def bytes_of(self, num_slots: int) -> int:
        """The most bytes that the experts in so many slots can take."""
        num_usual = self.num_experts - sum(count for _, count in self.others)
        nbytes = 0
        for size, count in sorted(((self.slot_bytes, num_usual), *self.others), reverse=True):
            taken = min(count, num_slots)
            nbytes += taken * size
            num_slots -= taken
        return nbytes


def smallest_budget(needs: Sequence[PoolNeed]) -> int:
    """The fewest bytes that work: one slot in every pool, through which a layer's experts pass one after another."""
    return sum(need.largest_bytes for need in needs)


def share_out(budget_bytes: int, needs: Sequence[PoolNeed]) -> list[int]:
    """Slots for each pool; together they take at most `budget_bytes`.

    Every pool gets one slot; then slots go one by one to the pool with the smallest part of its experts covered, until
    the next one does not fit. So a larger budget gives every pool at least as many slots.
    Raises `CapacityError` if not even the first slots fit.
    """
    smallest = smallest_budget(needs)
    if budget_bytes < smallest:
        raise CapacityError(
            f"a cache budget of {budget_bytes:,} bytes is too small: one slot for an expert takes {smallest:,} bytes; "
            f"set OffloadConfig.cache_budget to {smallest:,} bytes or more",
            smallest_budget=smallest,
        )
    left = budget_bytes - smallest
    slots = [1] * len(needs)
    turns = ((count / need.num_experts, i) for i, need in enumerate(needs) for count in range(2, need.num_experts + 1))
    for _, i in sorted(turns):
        more = needs[i].bytes_of(slots[i] + 1) - needs[i].bytes_of(slots[i])
        if more > left:
            break
        slots[i] += 1
        left -= more
    return slots


def share_out_by_device(
    available: Mapping[D, int], devices: Sequence[D], needs: Sequence[PoolNeed]
) -> tuple[int, list[int]]:
    """The bytes that all pools may use, and slots for each pool within what is available on its own device.

    `devices` are those of the pools. Raises `CapacityError` if one of them has no room for the first slots.
    """
    slots, budget_bytes = [0] * len(needs), 0
    for device in dict.fromkeys(devices):
        members = [i for i, other in enumerate(devices) if other == device]
        of_device = [needs[i] for i in members]
        nbytes = min(available[device], sum(need.all_bytes for need in of_device))
        budget_bytes += nbytes
        for i, num_slots in zip(members, share_out(nbytes, of_device), strict=True):
            slots[i] = num_slots
    return budget_bytes, slots


def layer_floor(num_slots: int, num_layers: int) -> int:
    """Slots that the other layers must leave to each layer of a pool."""
    return int(num_slots / num_layers * FLOOR_SHARE)


def most_used(counts: Mapping[int, Sequence[float]], num_slots: int) -> list[ExpertId]:
    """The experts with the highest counts, `counts[layer][expert]`, for so many slots; the highest first.

    Each layer gets its floor first, as it would once all layers have asked; the slots that are left go to the highest
    counts of all. Experts that were never used get no slot.
    """
    ranked = sorted(
        (ExpertId(layer, expert) for layer, uses in counts.items() for expert, count in enumerate(uses) if count > 0),
        key=lambda expert: (-counts[expert.layer][expert.expert], expert),
    )
    floor = layer_floor(num_slots, len(counts)) if counts else 0
    chosen = [expert for layer in counts for expert in [e for e in ranked if e.layer == layer][:floor]]
    left = [expert for expert in ranked if expert not in set(chosen)]
    return sorted(chosen + left[: max(0, num_slots - len(chosen))], key=ranked.index)
