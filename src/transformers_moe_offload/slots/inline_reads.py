"""Small experts, which are read without another thread.

Two threads on two busy cores take 50 to 100 us to hand a read over and to hand its end back, as long as it takes to
read an expert of 100 KiB from the disk, and ten times as long as to copy it from the page cache. So an expert that is
in the page cache is copied at once. Any other is announced to the system, which fetches it meanwhile, and copied by the
thread that waits for it.
"""

from __future__ import annotations

import time

from torch import Tensor

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.transfer import Landed, Transfer
from transformers_moe_offload.store.expert_store import ExpertStore

SMALL_BYTES = 256 << 10
"""Most bytes of a small record: it is copied in 20 to 60 us, and computing with it takes less than that."""


class InlineReads:
    """Begins to read the small experts of a store."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def start(self, expert: ExpertId, slot: Tensor) -> Transfer | None:
        """Begin to fill a slot, (nbytes,) uint8; None if a reader thread is needed: the expert is large, or not read as
        it is stored and through the page cache, or the system cannot be asked to fetch it."""
        if slot.numel() > SMALL_BYTES:
            return None
        if self._store.read_cached_into(expert, slot):
            return Landed(self._store.stored_bytes(expert))
        return Announced(self._store, expert, slot) if self._store.announce(expert) else None


class Announced:
    """An expert that the system is fetching into the page cache."""

    def __init__(self, store: ExpertStore, expert: ExpertId, slot: Tensor) -> None:
        self.seconds = 0.0
        self._store = store
        self._expert = expert
        self._slot = slot
        self._is_read = False

    def is_done(self) -> bool:
        """Whether it is in the page cache by now; if so, it is copied."""
        self._is_read = self._is_read or self._store.read_cached_into(self._expert, self._slot)
        return self._is_read

    def finish(self) -> int:
        """Copy what has been fetched, and wait for the rest."""
        if self._is_read:
            return self._store.stored_bytes(self._expert)
        began = time.perf_counter()
        from_files = self._store.read_into(self._expert, self._slot)
        self.seconds = time.perf_counter() - began
        return from_files

    def cancel(self) -> bool:
        """Give it up, unless it has been copied."""
        return not self._is_read
