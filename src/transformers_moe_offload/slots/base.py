"""The fast tier: places that hold one expert each, and how experts are loaded into them.

The cache knows slots by number. A number stands for a buffer on a device that experts are copied into (`CopiedSlots`),
pages that a disk writes into (`DirectSlots`), or the right to have one expert's pages of the checkpoint mapped
(`MappedSlots`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.transfer import Transfer
from transformers_moe_offload.store.layer_source import Weights


class Slots(Protocol):
    """Numbered places for experts."""

    @property
    def num_lanes(self) -> int:
        """Experts that can be in flight at once."""

    def add(self, slot: int) -> None:
        """Make a place under a new number."""

    def remove(self, slot: int) -> None:
        """Give up a place that is not in use."""

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> Transfer:
        """Begin to load an expert into a slot, in place of the one that was there; uses of that must be retired.

        `alongside` is the number of other experts in flight.
        """

    @property
    def weights(self) -> Mapping[int, Weights]:
        """The weights of the expert in each slot, valid once its load has finished and until the next one begins."""

    @property
    def retire(self) -> Callable[[Sequence[int]], None] | None:
        """To be called with slots once everything that reads them has been submitted: the next loads into them come
        after that. None where work is over when it has been submitted, as on a CPU."""

    @property
    def lost(self) -> Callable[[Sequence[int]], Sequence[int]] | None:
        """Those of some slots whose experts are not there any more: the kernel can take pages of the page cache. None
        where an expert stays until it is replaced."""

    @property
    def sure_for(self) -> float:
        """Seconds after each use for which an expert that was not lost need not be looked at again; infinity where
        `lost` is None."""

    @property
    def are_files_unchanged(self) -> Callable[[float], bool] | None:
        """Whether the files that experts are used in are what they were, at a time of `time.monotonic`; None where no
        expert is used in a file."""

    def give_back(self) -> None:
        """Give back memory that evicted experts still take in case they return."""

    def start_over(self, held: Mapping[int, ExpertId]) -> None:
        """Wait until no load is in flight; from then on only the experts `held` are in slots, by slot.

        Called after an interrupt, which may have left any step half done.
        """

    def device_bytes(self, expert: ExpertId) -> int:
        """Bytes that cross to an accelerator when the expert is loaded."""
