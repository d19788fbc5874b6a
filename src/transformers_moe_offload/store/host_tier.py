"""The host tier: records in RAM, between the disk and the accelerators. Read-only, like the disk below it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.chunks import Chunk
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.record import Fill
from transformers_moe_offload.system.host_memory import copy_bytes, host_bytes


class HostTier:
    """Keeps the records that were used last, as far as a budget goes; the others are read from disk again.

    In pageable memory, so that the system is not starved; only the staging buffers that copies to the accelerator start
    from are page-locked. Safe to use from several threads: two that want one expert read it once.
    """

    def __init__(self, store: ExpertStore, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.store = store
        self._lock = threading.Lock()
        self._entries: OrderedDict[ExpertId, _Entry] = OrderedDict()
        self._spare: dict[int, list[Tensor]] = {}
        self.nbytes = 0
        """Bytes that the tier holds."""

    def fill(self, expert: ExpertId, chunk_bytes: int | None = None) -> Fill:
        """Begin to fill a record with an expert; what is kept already comes from memory."""
        fill = self.store.fill(expert, chunk_bytes)
        entry, is_new = self._enter(expert)
        if entry is None:
            return fill
        return self._filling(expert, entry, fill) if is_new else self._kept(entry, fill)

    def has(self, expert: ExpertId) -> bool:
        """Whether an expert can be loaded without reading a file."""
        with self._lock:
            entry = self._entries.get(expert)
            return entry is not None and entry.is_ready.is_set() and not entry.has_failed

    @contextmanager
    def hold(self, expert: ExpertId) -> Iterator[Tensor]:
        """An expert's record, uint8 (nbytes,), valid until the block ends."""
        entry, is_new = self._enter(expert)
        if entry is None:
            yield self._read(expert)
            return
        try:
            if is_new:
                self._read_into(expert, entry)
            entry.is_ready.wait()
            yield self._read(expert) if entry.has_failed else entry.record
        finally:
            self._let_go(entry)

    def _read(self, expert: ExpertId) -> Tensor:
        """A record that the tier has no room for."""
        record = torch.empty(self.store.layout(*expert).nbytes, dtype=torch.uint8)
        self.store.read_into(expert, record)
        return record

    def _enter(self, expert: ExpertId) -> tuple[_Entry | None, bool]:
        """The expert's entry and whether it has yet to be filled; None where there is no room for it."""
        with self._lock:
            entry = self._entries.get(expert)
            if entry is not None:
                self._entries.move_to_end(expert)
                entry.num_users += 1
                return entry, False
            record = self._make_room(self.store.layout(*expert).nbytes)
            if record is None:
                return None, False
            entry = self._entries[expert] = _Entry(record)
            return entry, True

    def _read_into(self, expert: ExpertId, entry: _Entry) -> None:
        try:
            self.store.read_into(expert, entry.record)
        except BaseException:
            self._drop(expert, entry)
            raise
        entry.is_ready.set()

    def _filling(self, expert: ExpertId, entry: _Entry, fill: Fill) -> Fill:
        """Read a record into the tier, and copy it on from there."""
        record = host_bytes(entry.record)

        def read(chunk: Chunk, targets: Sequence[memoryview]) -> None:
            kept = chunk.inside(record)
            fill.read(chunk, kept)
            _copy_all(targets, kept)

        def finish(_: Tensor | None) -> int:
            from_files = fill.finish(entry.record)
            entry.is_ready.set()
            self._let_go(entry)
            return from_files

        return Fill(fill.chunks, read, finish, lambda: self._drop(expert, entry))

    def _kept(self, entry: _Entry, fill: Fill) -> Fill:
        """Copy a record that the tier has, or that another thread is reading into it; from disk if that one fails."""

        def read(chunk: Chunk, targets: Sequence[memoryview]) -> None:
            entry.is_ready.wait()
            if entry.has_failed:  # on another thread; the file may be back
                fill.read(chunk, targets)
            else:
                _copy_all(targets, chunk.inside(host_bytes(entry.record)))

        def finish(record: Tensor | None) -> int:
            self._let_go(entry)
            return fill.finish(record) if entry.has_failed else 0

        return Fill(fill.chunks, read, finish, lambda: self._let_go(entry), fill.is_checked)

    def _drop(self, expert: ExpertId, entry: _Entry) -> None:
        """Remove an entry that will not be filled: threads that wait for it read the file themselves."""
        entry.has_failed = True
        with self._lock:
            if self._entries.get(expert) is entry:
                del self._entries[expert]
                self.nbytes -= entry.record.nbytes
        entry.is_ready.set()

    def _let_go(self, entry: _Entry) -> None:
        """An entry has one user less."""
        with self._lock:
            entry.num_users -= 1

    def _make_room(self, nbytes: int) -> Tensor | None:
        """Memory for a record: spare, new within the budget, or of evicted entries: longest unused, without users."""
        while self.nbytes + nbytes > self.budget_bytes:
            victim = next((expert for expert, entry in self._entries.items() if not entry.num_users), None)
            if victim is None:
                return None
            freed = self._entries.pop(victim).record
            self.nbytes -= freed.nbytes
            self._spare.setdefault(freed.nbytes, []).append(freed)
        if self._spare.get(nbytes):
            record = self._spare[nbytes].pop()
        else:
            self._spare.clear()  # records of another size: their memory is needed
            with torch.inference_mode(False):
                record = torch.empty(nbytes, dtype=torch.uint8)
        self.nbytes += nbytes
        return record


class _Entry:
    """One record, and the number of its users."""

    def __init__(self, record: Tensor) -> None:
        self.record = record
        self.is_ready = threading.Event()
        self.has_failed = False
        self.num_users = 1


def _copy_all(targets: Sequence[memoryview], sources: Sequence[memoryview]) -> None:
    for target, source in zip(targets, sources, strict=True):
        copy_bytes(target, source)
