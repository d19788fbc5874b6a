"""Experts that the kernel reads on its own, past the page cache: no thread waits for them, and no core copies.

A thread that reads takes 50 to 100 us to be woken and to tell that it has read, on cores that compute meanwhile. To
submit a read takes some 20 us, and to look for those that have ended 2 us.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

from torch import Tensor

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.memory.aio import AsyncReads
from transformers_moe_offload.memory.page_reads import PageRead
from transformers_moe_offload.memory.record import host_bytes

MOST_READS = 128
"""That the kernel is told of at once."""

MOST_BYTES = 7 << 20
"""The same. It keeps disks busy, and what is told later can still be given up. Reads that a disk does at the same time
end at the same time: with up to 16 MiB all of a layer's experts did, and there was nothing to compute until then."""

AT_ONCE = 3
"""Reads in a row that have ended when they were just submitted: the system reads while it is told to."""


class KernelQueue:
    """What the kernel is told to read, in this order. Raises `OSError` where the system offers no such thing.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._system = AsyncReads(MOST_READS)
        self._lock = threading.RLock()
        self._waiting: deque[tuple[QueuedExpert, PageRead]] = deque()
        self._reading: dict[int, tuple[QueuedExpert, PageRead]] = {}
        self._reading_bytes = 0
        self._keys = count(1)
        self._busy_since = 0.0
        """When what is being read began, at the earliest: the latest end of a read that is known of."""
        self._at_once: int | None = 0
        """Reads that had ended when they were just submitted; None once there was one that had not."""
        self.seconds_per_byte = 0.0
        """Of reads, one after another, when somebody waited last."""

    @property
    def is_synchronous(self) -> bool:
        """Whether the system reads while it is told to: a thread should be told to instead."""
        return self._at_once == AT_ONCE

    def start(self, reads: Sequence[PageRead], slot: Tensor, complete: Callable[[], int]) -> QueuedExpert:
        """Begin to read an expert into a slot, (nbytes,) uint8, that begins at a page.

        `complete` is called by whoever waits for it, when all of it is there, and returns the bytes that came from
        files.
        """
        expert = QueuedExpert(self, reads, slot, complete)
        with self._lock:
            self._waiting.extend((expert, read) for read in reads)
            self._submit()
        return expert

    # What follows is for the experts.

    def look(self) -> None:
        """Note what has ended."""
        with self._lock:
            if self._note(0):
                self._busy_since = time.perf_counter()

    def wait(self) -> None:
        """Wait until something has ended."""
        with self._lock:
            nbytes = self._note(1 if self._reading else 0)
            now = time.perf_counter()
            if nbytes:
                self.seconds_per_byte = (now - self._busy_since) / nbytes
                self._busy_since = now

    def withdraw(self, expert: QueuedExpert) -> bool:
        """Forget an expert of which the kernel has not been told; returns whether it had not."""
        with self._lock:
            others = deque(one for one in self._waiting if one[0] is not expert)
            if len(self._waiting) - len(others) < expert.num_reads:
                return False
            self._waiting = others
            return True

    def _note(self, at_least: int) -> int:
        """Note what has ended, once it is so much, and tell the kernel of more; returns the bytes that have come."""
        ended, nbytes = self._system.ended(at_least), 0
        for key, result in ended:
            if key in self._reading:  # else it was noted before an interruption
                expert, read = self._reading.pop(key)
                self._reading_bytes -= read.nbytes
                expert.has_ended(read, result >= read.needed)
                nbytes += read.nbytes
        self._system.seen(len(ended))
        self._submit()
        return nbytes

    def _submit(self) -> None:
        """Tell the kernel of what waits, as far as it is to know of so much at once."""
        while self._waiting and len(self._reading) < MOST_READS and self._reading_bytes < MOST_BYTES:
            expert, read = self._waiting.popleft()
            if not self._reading:
                self._busy_since = time.perf_counter()
            key = next(self._keys)
            self._reading[key] = expert, read
            self._reading_bytes += read.nbytes
            if self._is_told(key, read, expert.address):
                self._try_out()
            else:
                del self._reading[key]
                self._reading_bytes -= read.nbytes
                expert.has_ended(read, False)

    def _is_told(self, key: int, read: PageRead, address: int) -> bool:
        """Tell the kernel; False if it refuses. Why, will be told when it is read once more."""
        try:
            reader = read.file.directly()
            if reader is not None:
                self._system.submit(key, reader.descriptor, read.offset, address + read.start, read.nbytes)
        except (OSError, CheckpointError):
            return False
        return reader is not None

    def _try_out(self) -> None:
        """See whether the only read that was submitted has ended already, a few times."""
        if self._at_once is not None and not self.is_synchronous and len(self._reading) == 1:
            self._at_once = self._at_once + 1 if self._system.ended(0) else None


class QueuedExpert:
    """One expert on its way."""

    def __init__(
        self, queue: KernelQueue, reads: Sequence[PageRead], slot: Tensor, complete: Callable[[], int]
    ) -> None:
        self.num_reads = len(reads)
        self.address = slot.data_ptr()
        self._queue = queue
        self._slot = slot
        self._complete = complete
        self._num_left = len(reads)
        self._failed: list[PageRead] = []
        self._nbytes = sum(read.nbytes for read in reads)

    @property
    def seconds(self) -> float:
        """How long it kept the disk busy, as far as is known."""
        return self._nbytes * self._queue.seconds_per_byte

    def is_done(self) -> bool:
        """Whether all of it is there."""
        if self._num_left:
            self._queue.look()
        return not self._num_left

    def finish(self) -> int:
        """Wait for all of it; what the kernel could not read is read once more, by whoever waits.

        Returns the bytes that came from files, or raises `CheckpointError`.
        """
        while self._num_left:
            self._queue.wait()
        while self._failed:
            read = self._failed[-1]
            target = host_bytes(self._slot)[read.start : read.start + read.nbytes]
            read.file.read_pages_into(target, read.offset, read.needed)
            self._failed.pop()
        return self._complete()

    def cancel(self) -> bool:
        """Give it up, unless the kernel has been told of it; returns whether it had not."""
        return self._queue.withdraw(self)

    def has_ended(self, read: PageRead, is_there: bool) -> None:
        """One of its reads is over."""
        if not is_there:
            self._failed.append(read)
        self._num_left -= 1
