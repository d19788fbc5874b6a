"""The fast tier: places that hold one expert each, and what brings experts into them.

The cache knows slots by number. What a number stands for is a buffer on a device that experts are copied into
(`CopiedSlots`), pages that a disk writes into (`DirectSlots`), or the right to have one expert's pages of the
checkpoint mapped (`MappedSlots`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.transfer import Transfer

Weights = dict[str, Tensor]
"""One expert's tensors by field name. Views of a slot: they change when the slot is given to another expert."""


class Slots(Protocol):
    """Numbered places for experts."""

    @property
    def num_lanes(self) -> int:
        """Experts that can be on their way at once."""

    def add(self, slot: int) -> None:
        """Make a place under a new number."""

    def remove(self, slot: int) -> None:
        """Give up a place that nobody uses."""

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> Transfer:
        """Begin to bring an expert in, in place of whoever was there. What used that one must have been retired.

        So many others are on their way `alongside`.
        """

    def retire(self, slot: int) -> None:
        """Everything that reads this slot has been submitted; whatever is brought in next comes after that."""

    def weights(self, expert: ExpertId, slot: int) -> Weights:
        """The expert that was brought in, for as long as the slot is not given to another one."""

    def holds(self, slot: int) -> bool:
        """Whether the expert that was brought in is still there: the system can take back what is its own."""

    def give_back(self) -> None:
        """Give back memory that experts take although they have left, in case they return."""

    def start_over(self, held: Mapping[int, ExpertId]) -> None:
        """Wait until nothing is brought in any more; from then on nobody is anywhere but those `held`, by slot.

        For after an interrupt, which may have left anything half done that was begun.
        """

    def device_bytes(self, expert: ExpertId) -> int:
        """Bytes that cross to an accelerator when the expert is brought in."""
