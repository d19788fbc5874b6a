"""Slots for zero-copy reads: disks write whole pages of the files into them, past the page cache.

An expert is used where its bytes land, as far behind the beginning of a page as in its file. An expert that is not
stored as it is used is read into a record instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.aio_queue import AioQueue
from transformers_moe_offload.disk_io.page_reads import PageRead, Placed, parts, placed
from transformers_moe_offload.disk_io.read import Work
from transformers_moe_offload.disk_io.reader_pool import ReaderPool, chunk_bytes
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.transfer import HostCopier, Transfer
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import Weights
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.system.host_memory import PageMemory, host_bytes

_Lie = tuple[RecordLayout, tuple[int, ...] | None]
"""An expert's record layout, and where its fields begin; None if they begin where they do in a record."""


class DirectSlots:
    """Slots in host memory that begin at pages, equal unless they hold records of another size."""

    retire = None
    lost = None
    sure_for = math.inf
    are_files_unchanged = None

    def __init__(self, store: ExpertStore, slot_bytes: int, spare_bytes: int, workers: int) -> None:
        """`spare_bytes` of the `slot_bytes` are for the parts of pages that an expert does not fill."""
        self.reader = PageReader(workers)
        self._store = store
        self._slot_bytes = slot_bytes
        self._spare_bytes = spare_bytes
        self._copier = HostCopier(store.fill, workers)
        self._memory = PageMemory()
        self._slots: dict[int, Tensor] = {}
        self._places: dict[ExpertId, Placed | None] = {}
        self.weights: dict[int, Weights] = {}
        self._seen: dict[int, tuple[_Lie, Weights]] = {}
        """By slot, the placement of the expert whose weights were viewed last, and the views: experts of one file are
        placed alike, as a rule."""

    @property
    def num_lanes(self) -> int:
        """Loads that share the disk's time."""
        return self.reader.num_lanes

    def add(self, slot: int) -> None:
        """Allocate pages; they take memory when they are written for the first time."""
        self._slots[slot] = self._memory.take(self._slot_bytes)

    def remove(self, slot: int) -> None:
        """Free the pages."""
        self._seen.pop(slot, None)
        self.weights.pop(slot, None)
        self._memory.give_back(self._slots.pop(slot))

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> Transfer:
        """Begin to read an expert into the slot's pages."""
        place, layout = self._place(expert), self._store.layout(*expert)
        memory = self._fitting(slot, layout.nbytes if place is None else place.nbytes)
        self.weights[slot] = self._views(slot, (layout, None if place is None else place.offsets))
        if place is None:
            return self._copier.start(expert, memory[: layout.nbytes], alongside)
        return self.reader.start(place.reads, memory, partial(self._complete, expert, place, memory), alongside)

    def give_back(self) -> None:
        """Nothing to do: evicted experts are overwritten."""

    def start_over(self, held: Mapping[int, ExpertId]) -> None:
        """Wait for the disk; only the cache knows which expert is in which slot."""
        self.reader.drain()
        self._copier.drain()

    def device_bytes(self, expert: ExpertId) -> int:
        """There is no accelerator."""
        return 0

    def _views(self, slot: int, lie: _Lie) -> Weights:
        """An expert's tensors in a slot's pages."""
        seen = self._seen.get(slot)
        if seen is None or seen[0] != lie:
            with torch.inference_mode(False):  # a model that generates now may be trained later
                seen = self._seen[slot] = lie, lie[0].views(self._slots[slot], lie[1])
        return seen[1]

    def _place(self, expert: ExpertId) -> Placed | None:
        if expert not in self._places:
            ranges = self._store.file_ranges(expert)
            self._places[expert] = None if ranges is None else placed(ranges)
        return self._places[expert]

    def _fitting(self, slot: int, nbytes: int) -> Tensor:
        """A slot's memory, replaced if it is too small for `nbytes`, or larger than a record of that size needs."""
        old = self._slots[slot]
        if nbytes <= old.nbytes <= nbytes + self._spare_bytes:
            return old
        new = self._memory.take(nbytes)  # takes only addresses until it is written to
        self._seen.pop(slot, None)
        self._slots[slot] = new
        self._memory.give_back(old)
        return new

    def _complete(self, expert: ExpertId, place: Placed, memory: Tensor) -> int:
        if self._store.has_to_check(expert):
            begins = place.offsets[0]
            self._store.check(expert, memory[begins : begins + self._store.layout(*expert).nbytes])
        return self._store.stored_bytes(expert)


class PageReader:
    """Reads pages by the kernel's asynchronous I/O, or by reader threads where there is none."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._lanes = ReaderPool(workers)
        self._queue: AioQueue | None
        try:
            self._queue = AioQueue()
        except OSError:
            self._queue = None

    @property
    def num_lanes(self) -> int:
        """Reads whose measured times overlap; `AioQueue` measures times as if reads were done one after another."""
        return self._workers if self._queue is None else 1

    def start(
        self, reads: Sequence[PageRead], memory: Tensor, complete: Callable[[], int], alongside: int = 0
    ) -> Transfer:
        """Begin to read pages into memory, uint8, that begins at a page; `complete` returns the bytes that came from
        files, once all are there. `alongside` other experts are in flight."""
        if self._queue is not None and not self._queue.is_synchronous:
            return self._queue.start(reads, memory, complete)
        most, raw = chunk_bytes(memory.nbytes, self._workers, alongside), host_bytes(memory)
        chunks = [part for read in reads for part in parts(read, most or read.nbytes)]
        return self._lanes.start(Work([partial(_read, chunk, raw) for chunk in chunks], complete))

    def drain(self) -> None:
        """Wait until nothing is read any more."""
        self._lanes.drain()
        if self._queue is not None:
            self._queue.start_over()


def _read(read: PageRead, memory: memoryview) -> None:
    read.file.read_pages_into(memory[read.start : read.start + read.nbytes], read.offset, read.needed)
