"""Carry experts into slots, in the background.

A `Copier` starts a transfer and hands back a `Transfer` to wait on. On a CPU machine reader threads fill the slot
directly from the file; `cuda/copier.py` has the way to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from transformers_moe_offload.disk_io.read import Work
from transformers_moe_offload.disk_io.reader_pool import ReaderPool, chunk_bytes
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.store.record import OpenFill
from transformers_moe_offload.system.host_memory import host_bytes


class Transfer(Protocol):
    """One expert in flight into one slot."""

    @property
    def seconds(self) -> float:
        """How long reader threads were busy with it, all of them together, without the time in the queue."""

    def is_done(self) -> bool:
        """Whether `finish` would return at once."""

    def finish(self) -> int:
        """Make the slot usable by what the caller computes next and return the bytes that came from files, or raise
        what went wrong on the way."""

    def cancel(self) -> bool:
        """Cancel a transfer that has not begun; returns whether it was cancelled."""


class Copier(Protocol):
    """Moves experts into slots."""

    num_lanes: int
    """Experts that can be in flight at once."""

    def start(self, expert: ExpertId, slot: Tensor, alongside: int = 0) -> Transfer:
        """Begin to fill a slot, (nbytes,) uint8. Its previous content may be in use until `retire` was called.

        `alongside` other experts are in flight; the fewer, the more reader threads are free for each.
        """

    is_asynchronous: bool
    """Whether work that was submitted may still read slots, so that they have to be retired."""

    def retire(self, slot: Tensor) -> None:
        """Everything that reads this slot has been submitted; the next copy into it comes after that."""

    def drain(self) -> None:
        """Wait until nothing writes into any slot; a transfer that has not begun is given up."""


class Landed:
    """A transfer that was over when it began."""

    seconds = 0.0

    def __init__(self, from_files: int) -> None:
        self._from_files = from_files

    def is_done(self) -> bool:
        """Always True."""
        return True

    def finish(self) -> int:
        """The bytes of the files that are used."""
        return self._from_files

    def cancel(self) -> bool:
        """Always False: the transfer is over."""
        return False


StartHere = Callable[[ExpertId, Tensor], Transfer | None]
"""Begins to fill a slot, (nbytes,) uint8, without another thread; None if reader threads should do it."""


def no_start(expert: ExpertId, slot: Tensor) -> None:
    """Leave every expert to reader threads."""


class HostCopier:
    """Fills slots in host memory."""

    is_asynchronous = False
    """CPU kernels have finished when they return."""

    def __init__(self, fill: OpenFill, workers: int, small: StartHere = no_start) -> None:
        self.num_lanes = workers
        self._small = small
        self._open = fill
        self._lanes = ReaderPool(workers)

    def start(self, expert: ExpertId, slot: Tensor, alongside: int = 0) -> Transfer:
        """Begin to read an expert straight into its slot."""
        if (transfer := self._small(expert, slot)) is not None:
            return transfer
        fill = self._open(expert, chunk_bytes(slot.numel(), self.num_lanes, alongside))
        record = host_bytes(slot)
        try:
            reads = [partial(fill.read, chunk, chunk.inside(record)) for chunk in fill.chunks]
            return self._lanes.start(Work(reads, lambda: fill.finish(slot), fill.give_up))
        except BaseException:
            fill.give_up()
            raise

    def retire(self, slot: Tensor) -> None:
        """Nothing to do."""

    def drain(self) -> None:
        """Wait for the reader threads."""
        self._lanes.drain()
