"""The host tier: records in RAM, between the disk and the accelerators. Read-only, like the disk below it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.memory.checkpoint import ExpertStore


class HostTier:
    """Keeps the records that were used last, as far as a budget goes; the others are read from disk again.

    In ordinary, pageable memory, so that the system is not starved; page-locked are only the staging buffers that
    copies to the accelerator start from. Safe to use from several threads: two that want one expert read it once.
    """

    def __init__(self, store: ExpertStore, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.store = store
        self._lock = threading.Lock()
        self._entries: OrderedDict[ExpertId, _Entry] = OrderedDict()
        self._spare: dict[int, list[Tensor]] = {}
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the tier holds."""
        return self._nbytes

    def read_into(self, expert: ExpertId, record: Tensor) -> int:
        """Fill a record, (nbytes,) uint8 in host memory, and return the bytes that came from files: 0 for a hit."""
        entry, is_new = self._enter(expert)
        if entry is None:
            return self.store.read_into(expert, record)
        try:
            from_files = self._fill(expert, entry) if is_new else 0
            entry.is_ready.wait()
            if entry.has_failed:  # for somebody else; the file may be back
                return self.store.read_into(expert, record)
            record.copy_(entry.record)
        finally:
            with self._lock:
                entry.num_users -= 1
        return from_files

    def has(self, expert: ExpertId) -> bool:
        """Whether an expert could be had without reading a file."""
        with self._lock:
            entry = self._entries.get(expert)
            return entry is not None and entry.is_ready.is_set() and not entry.has_failed

    @contextmanager
    def hold(self, expert: ExpertId) -> Iterator[Tensor]:
        """An expert's record, uint8 (nbytes,), which stays what it is until the block ends."""
        entry, is_new = self._enter(expert)
        if entry is None:
            yield self._read(expert)
            return
        try:
            if is_new:
                self._fill(expert, entry)
            entry.is_ready.wait()
            yield self._read(expert) if entry.has_failed else entry.record
        finally:
            with self._lock:
                entry.num_users -= 1

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

    def _fill(self, expert: ExpertId, entry: _Entry) -> int:
        try:
            return self.store.read_into(expert, entry.record)
        except BaseException:
            entry.has_failed = True
            with self._lock:
                del self._entries[expert]
                self._nbytes -= entry.record.nbytes
            raise
        finally:
            entry.is_ready.set()

    def _make_room(self, nbytes: int) -> Tensor | None:
        """Memory for a record: spare, new within the budget, or that of the longest unused that nobody is using."""
        while self._nbytes + nbytes > self.budget_bytes:
            victim = next((expert for expert, entry in self._entries.items() if not entry.num_users), None)
            if victim is None:
                return None
            freed = self._entries.pop(victim).record
            self._nbytes -= freed.nbytes
            self._spare.setdefault(freed.nbytes, []).append(freed)
        self._nbytes += nbytes
        if self._spare.get(nbytes):
            return self._spare[nbytes].pop()
        self._spare.clear()  # records of another size: their memory is needed
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8)


class _Entry:
    """One record, and who is using it."""

    def __init__(self, record: Tensor) -> None:
        self.record = record
        self.is_ready = threading.Event()
        self.has_failed = False
        self.num_users = 1
