"""Slots of a device whose experts are read through a table of addresses, filled from the arena by a copy stream.

An expert that leaves is read in the arena again by every kernel submitted later, and its slot is not written to before
those submitted earlier are done. An expert that has landed is read in its slot by kernels submitted after the table has
been published. In between both places hold its bytes, so which of them a kernel reads makes no difference.

A prompt uses the same slots through an ordinary `ExpertCache`, which marks the end of its own kernels (`retire`).
Kernels of the device's own forwards read the table, and each of them is assumed to read every slot that is in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from transformers_moe_offload.device_decode.arena import Arena
from transformers_moe_offload.device_decode.streams import Copy, Mark, Streams
from transformers_moe_offload.device_decode.table import AddressTable
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.buffers import SlotPool
from transformers_moe_offload.slots.transfer import Transfer
from transformers_moe_offload.store.layer_source import Weights


class AddressedSlots:
    """Numbered places for experts, kept in agreement with the address table."""

    num_lanes = 1
    """One stream copies."""
    lost = None
    sure_for = math.inf
    are_files_unchanged = None

    def __init__(self, arena: Arena, pool: SlotPool, table: AddressTable, streams: Streams) -> None:
        self.pool = pool
        self.copy_seconds = 0.0
        """Seconds of the latest copy that is known to have ended."""
        self._arena = arena
        self._table = table
        self._streams = streams
        self.weights: dict[int, Weights] = {}
        self._occupant: dict[int, ExpertId] = {}
        self._last_use: dict[int, Mark] = {}
        """By slot, a mark behind the latest work of a cache's visits that uses it."""
        self._table_read: Mark | None = None
        """The end of all kernels that read the table before the latest change; None if there are later ones."""

    def add(self, slot: int) -> None:
        """Allocate a buffer; its memory may have been another tensor's, which kernels in flight still read."""
        self.pool.add(slot)
        self._last_use[slot] = self._streams.mark()

    def remove(self, slot: int) -> None:
        """Free a buffer. What is allocated on the compute stream next comes after the kernels that read it."""
        self._vacate(slot)
        del self._last_use[slot]
        self.weights.pop(slot, None)
        self.pool.remove(slot)

    def table_is_read(self) -> None:
        """Kernels that read the table are, or may have been, submitted."""
        self._table_read = None

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> Transfer:
        """Begin to copy an expert into a slot."""
        self._vacate(slot)
        source = self._arena.record(expert)
        if self.pool.record(slot).nbytes != source.nbytes:
            self.pool.fit(slot, source.nbytes)
            self._last_use[slot] = self._streams.mark()
        if self._table_read is None:  # after the change: kernels submitted from now on do not find the slot
            self._table_read = self._streams.mark()
        self.weights[slot] = self.pool.views(slot, self._arena.layout(expert))
        target = self.pool.record(slot)
        copy = self._streams.copy(target, source, (self._table_read, self._last_use[slot]))
        self._occupant[slot] = expert
        return _Arrival(self, expert, target, copy)

    def retire(self, slots: Sequence[int]) -> None:
        """Everything that a visit reads in these slots has been submitted."""
        self._last_use |= dict.fromkeys(slots, self._streams.mark())

    def give_back(self) -> None:
        """Nothing to do: evicted experts are overwritten."""

    def start_over(self, held: Mapping[int, ExpertId]) -> None:
        """Wait for the device, and rewrite the table: addresses of experts that are held are yet to be published."""
        self._streams.synchronize()
        self._table_read = None
        self._table.start_over()
        self._occupant = dict(held)
        for slot, expert in held.items():
            self._table.arrive(expert, self.pool.record(slot).data_ptr())

    def device_bytes(self, expert: ExpertId) -> int:
        """Bytes of the record, unless the device's memory is the host's."""
        return 0 if self.pool.device.type == "cpu" else self._arena.layout(expert).nbytes

    # What follows is for `_Arrival`.

    def arrive(self, expert: ExpertId, target: Tensor, copy: Copy) -> None:
        """Work queued on the compute stream from now on may read an expert in its slot."""
        self._streams.join(copy)
        self._table.arrive(expert, target.data_ptr())

    def _vacate(self, slot: int) -> None:
        expert = self._occupant.pop(slot, None)
        if expert is not None:
            self._table.leave(expert)


class _Arrival:
    """One expert in flight from the arena into a slot."""

    def __init__(self, slots: AddressedSlots, expert: ExpertId, target: Tensor, copy: Copy) -> None:
        self._slots = slots
        self._expert = expert
        self._target = target
        self._copy = copy

    @property
    def seconds(self) -> float:
        """Seconds of the copy, or, while that is unknown, of the latest copy that is known to have ended."""
        seconds = self._copy.seconds
        if seconds is not None:
            self._slots.copy_seconds = seconds
        return self._slots.copy_seconds

    def is_done(self) -> bool:
        return self._copy.is_done()

    def finish(self) -> int:
        self._slots.arrive(self._expert, self._target, self._copy)
        return 0

    def cancel(self) -> bool:
        return False
