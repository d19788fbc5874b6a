"""Experts that the kernel reads asynchronously, past the page cache: no thread waits for them, and no core copies.

On cores that compute meanwhile, waking a reader thread and getting its result takes 50 to 100 us. Submitting a read to
the kernel takes some 20 us, and polling for completed ones 2 us.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from itertools import count
from typing import Concatenate, ParamSpec, TypeVar

from torch import Tensor

from transformers_moe_offload.disk_io.linux_aio import AsyncReads
from transformers_moe_offload.disk_io.page_reads import PageRead
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.system.forks import FORKS
from transformers_moe_offload.system.host_memory import host_bytes

P = ParamSpec("P")
T = TypeVar("T")

MOST_READS = 128
"""Most reads in flight at once."""

MOST_BYTES = 7 << 20
"""Most bytes in flight at once. They keep disks busy, and reads that are not submitted yet can still be cancelled.
Reads that a disk does at the same time end at the same time: with up to 16 MiB all of a layer's experts did, and there
was nothing to compute until then."""

AT_ONCE = 3
"""So many reads in a row that have ended right after submission show that the system reads synchronously."""


def _in_turn(method: Callable[Concatenate[AioQueue, P], T]) -> Callable[Concatenate[AioQueue, P], T]:
    """Let one thread at a time run a method. Ctrl-C may come between any two lines, so the queue starts over then; if
    that is interrupted, too, it does so at the next call."""

    @wraps(method)
    def in_turn(queue: AioQueue, /, *arguments: P.args, **named: P.kwargs) -> T:
        with queue.lock:
            if not queue.is_whole:
                queue.start_over()
            queue.is_whole = False
            try:
                result = method(queue, *arguments, **named)
            except BaseException:
                queue.start_over()
                raise
            queue.is_whole = True
            return result

    return in_turn


class AioQueue:
    """Reads that are submitted to the kernel in order. Raises `OSError` where the system has no asynchronous reads.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_whole = True
        """False while a method runs, and after one was interrupted in the middle."""
        self._system = AsyncReads(MOST_READS)
        self._unfinished: set[QueuedExpert] = set()
        self._waiting: deque[tuple[QueuedExpert, PageRead]] = deque()
        self._reading: dict[int, tuple[QueuedExpert, PageRead]] = {}
        self._reading_bytes = 0
        self._keys = count(1)
        self._busy_since = 0.0
        """When the reads in flight began, at the earliest: the latest known end of a read, or the first submission."""
        self._at_once: int | None = 0
        """Reads in a row that had ended right after submission; None once one had not."""
        self.seconds_per_byte = 0.0
        """Time that the disk took for a byte, measured at the latest wait."""
        FORKS.enter(self)

    @property
    def is_synchronous(self) -> bool:
        """Whether the system reads synchronously, during submission: reader threads should be used instead."""
        return self._at_once == AT_ONCE

    @_in_turn
    def start(self, reads: Sequence[PageRead], slot: Tensor, complete: Callable[[], int]) -> QueuedExpert:
        """Begin to read an expert into a slot, (nbytes,) uint8, that begins at a page.

        `complete` is called on the thread that waits in `finish`, when all of it is there, and returns the bytes that
        came from files.
        """
        expert = QueuedExpert(self, reads, slot, complete)
        self._unfinished.add(expert)
        self._waiting.extend((expert, read) for read in reads)
        self._submit()
        return expert

    def start_over(self) -> None:
        """Drop all reads, once the kernel writes nowhere any more; `finish` of their experts reads them instead."""
        with self.lock:
            self.is_whole = False
            self._system.close()
            self._waiting.clear()
            self._reading.clear()
            self._reading_bytes = 0
            for expert in self._unfinished:
                expert.give_up()
            self._unfinished.clear()
            self._system = AsyncReads(MOST_READS)
            self.is_whole = True

    def before_fork(self) -> None:
        """Wait until the kernel writes nowhere, and submit nothing more."""
        self.lock.acquire()
        try:
            self._rest()
        except BaseException:
            self.lock.release()
            raise

    def after_fork(self, *, is_child: bool) -> None:
        """Go on; a child needs a context of its own."""
        try:
            if is_child:
                self._system.close()
                with suppress(OSError):  # without a context, submissions fail and `finish` reads
                    self._system = AsyncReads(MOST_READS)
            self._submit()
        finally:
            self.lock.release()

    # What follows is for `QueuedExpert`.

    @_in_turn
    def look(self) -> None:
        """Process reads that have ended."""
        if self._note(0):
            self._busy_since = time.perf_counter()

    @_in_turn
    def wait(self) -> None:
        """Wait until a read in flight has ended."""
        nbytes = self._note(1 if self._reading else 0)
        now = time.perf_counter()
        if nbytes:
            self.seconds_per_byte = (now - self._busy_since) / nbytes
            self._busy_since = now

    @_in_turn
    def withdraw(self, expert: QueuedExpert) -> bool:
        """Drop an expert if none of its reads was submitted; returns whether it was dropped."""
        others = deque(one for one in self._waiting if one[0] is not expert)
        if len(self._waiting) - len(others) < expert.num_reads:
            return False
        self._waiting = others
        self._unfinished.discard(expert)
        return True

    @_in_turn
    def _rest(self) -> None:
        """Wait for all reads in flight, and submit nothing more."""
        try:
            for key, result in self._system.ended(len(self._reading)):
                self._has_ended(key, result)
        except OSError:  # as in `_note`
            self.start_over()

    def _note(self, at_least: int) -> int:
        """Wait until `at_least` reads have ended, process them, and submit more; returns the bytes of their pages."""
        try:
            ended = self._system.ended(at_least)
        except OSError:  # this process was forked from the one that submitted the reads
            self.start_over()
            return 0
        nbytes = sum(self._has_ended(key, result) for key, result in ended)
        self._submit()
        return nbytes

    def _has_ended(self, key: int, result: int) -> int:
        """A read has ended, with `result` bytes or an error below zero; returns the bytes that it was for."""
        expert, read = self._reading.pop(key)
        self._reading_bytes -= read.nbytes
        if expert.has_ended(read, result >= read.needed):
            self._unfinished.discard(expert)
        return read.nbytes

    def _submit(self) -> None:
        """Submit waiting reads, up to `MOST_READS` and `MOST_BYTES` in flight."""
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
                self._has_ended(key, -1)

    def _is_told(self, key: int, read: PageRead, address: int) -> bool:
        """Submit a read; False if the kernel rejects it. The cause surfaces when `finish` repeats the read."""
        try:
            reader = read.file.directly()
            if reader is not None:
                self._system.submit(key, reader.descriptor, read.offset, address + read.start, read.nbytes)
        except (OSError, CheckpointError):
            return False
        return reader is not None

    def _try_out(self) -> None:
        """Check for the first few reads that are alone in flight whether they have ended right after submission."""
        if self._at_once is None or self.is_synchronous or len(self._reading) > 1:
            return
        ended = self._system.ended(0)
        self._at_once = self._at_once + 1 if ended else None
        for key, result in ended:
            self._has_ended(key, result)


class QueuedExpert:
    """One expert in flight."""

    def __init__(self, queue: AioQueue, reads: Sequence[PageRead], slot: Tensor, complete: Callable[[], int]) -> None:
        self.num_reads = len(reads)
        self.address = slot.data_ptr()
        self._queue = queue
        self._slot = slot
        self._complete = complete
        self._left = set(reads)
        self._failed: list[PageRead] = []
        self._nbytes = sum(read.nbytes for read in reads)

    @property
    def seconds(self) -> float:
        """How long it kept the disk busy, as far as is known."""
        return self._nbytes * self._queue.seconds_per_byte

    def is_done(self) -> bool:
        """Whether all of it is there."""
        if self._left:
            self._queue.look()
        return not self._left

    def finish(self) -> int:
        """Wait for all of it; reads that failed in the kernel are repeated on the calling thread.

        Returns the bytes that came from files, or raises `CheckpointError`.
        """
        while self._left:
            self._queue.wait()
        while self._failed:
            read = self._failed[-1]
            target = host_bytes(self._slot)[read.start : read.start + read.nbytes]
            read.file.read_pages_into(target, read.offset, read.needed)
            self._failed.pop()
        return self._complete()

    def cancel(self) -> bool:
        """Drop it if none of its reads was submitted; returns whether it was dropped."""
        return self._queue.withdraw(self)

    # What follows is for `AioQueue`.

    def has_ended(self, read: PageRead, is_there: bool) -> bool:
        """One of its reads is over; returns whether all of them are."""
        if not is_there:
            self._failed.append(read)
        self._left.discard(read)
        return not self._left

    def give_up(self) -> None:
        """Count the reads that have not ended as failed: the kernel will not do them."""
        self._failed += self._left
        self._left.clear()
