"""Experts that the kernel reads on its own, past the page cache: no thread waits for them, and no core copies.

A thread that reads takes 50 to 100 us to be woken and to tell that it has read, on cores that compute meanwhile. To
submit a read takes some 20 us, and to look for those that have ended 2 us.
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
"""That the kernel is told of at once."""

MOST_BYTES = 7 << 20
"""The same. It keeps disks busy, and what is told later can still be given up. Reads that a disk does at the same time
end at the same time: with up to 16 MiB all of a layer's experts did, and there was nothing to compute until then."""

AT_ONCE = 3
"""Reads in a row that have ended when they were just submitted: the system reads while it is told to."""


def _in_turn(method: Callable[Concatenate[AioQueue, P], T]) -> Callable[Concatenate[AioQueue, P], T]:
    """One thread at a time. Ctrl-C may come between any two lines, so the queue starts over then; and if that is broken
    off, too, at the next call."""

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
    """What the kernel is told to read, in this order. Raises `OSError` where the system offers no such thing.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_whole = True
        """Whether nothing was broken off in the middle."""
        self._system = AsyncReads(MOST_READS)
        self._unfinished: set[QueuedExpert] = set()
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
        FORKS.enter(self)

    @property
    def is_synchronous(self) -> bool:
        """Whether the system reads while it is told to: a thread should be told to instead."""
        return self._at_once == AT_ONCE

    @_in_turn
    def start(self, reads: Sequence[PageRead], slot: Tensor, complete: Callable[[], int]) -> QueuedExpert:
        """Begin to read an expert into a slot, (nbytes,) uint8, that begins at a page.

        `complete` is called by whoever waits for it, when all of it is there, and returns the bytes that came from
        files.
        """
        expert = QueuedExpert(self, reads, slot, complete)
        self._unfinished.add(expert)
        self._waiting.extend((expert, read) for read in reads)
        self._submit()
        return expert

    def start_over(self) -> None:
        """Forget everything, once the kernel writes nowhere any more; whoever waits for an expert reads it."""
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
        """Wait until the kernel writes nowhere, and tell it of nothing more."""
        self.lock.acquire()
        try:
            self._rest()
        except BaseException:
            self.lock.release()
            raise

    def after_fork(self, *, is_child: bool) -> None:
        """Go on; a child has to ask for reads of its own."""
        try:
            if is_child:
                self._system.close()
                with suppress(OSError):  # whoever waits will read what the kernel does not
                    self._system = AsyncReads(MOST_READS)
            self._submit()
        finally:
            self.lock.release()

    # What follows is for the experts.

    @_in_turn
    def look(self) -> None:
        """Note what has ended."""
        if self._note(0):
            self._busy_since = time.perf_counter()

    @_in_turn
    def wait(self) -> None:
        """Wait until something has ended."""
        nbytes = self._note(1 if self._reading else 0)
        now = time.perf_counter()
        if nbytes:
            self.seconds_per_byte = (now - self._busy_since) / nbytes
            self._busy_since = now

    @_in_turn
    def withdraw(self, expert: QueuedExpert) -> bool:
        """Forget an expert of which the kernel has not been told; returns whether it had not."""
        others = deque(one for one in self._waiting if one[0] is not expert)
        if len(self._waiting) - len(others) < expert.num_reads:
            return False
        self._waiting = others
        self._unfinished.discard(expert)
        return True

    @_in_turn
    def _rest(self) -> None:
        """Wait for all that the kernel reads, and tell it of nothing more."""
        try:
            for key, result in self._system.ended(len(self._reading)):
                self._has_ended(key, result)
        except OSError:  # as in `_note`
            self.start_over()

    def _note(self, at_least: int) -> int:
        """Note what has ended, once it is so much, and tell the kernel of more; returns the bytes that have come."""
        try:
            ended = self._system.ended(at_least)
        except OSError:  # a process that was forked from the one that asked for the reads
            self.start_over()
            return 0
        nbytes = sum(self._has_ended(key, result) for key, result in ended)
        self._submit()
        return nbytes

    def _has_ended(self, key: int, result: int) -> int:
        """A read is over, with so many bytes or an error below zero; returns the bytes that it was to bring."""
        expert, read = self._reading.pop(key)
        self._reading_bytes -= read.nbytes
        if expert.has_ended(read, result >= read.needed):
            self._unfinished.discard(expert)
        return read.nbytes

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
                self._has_ended(key, -1)

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
        if self._at_once is None or self.is_synchronous or len(self._reading) > 1:
            return
        ended = self._system.ended(0)
        self._at_once = self._at_once + 1 if ended else None
        for key, result in ended:
            self._has_ended(key, result)


class QueuedExpert:
    """One expert on its way."""

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
        """Wait for all of it; what the kernel could not read is read once more, by whoever waits.

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
        """Give it up, unless the kernel has been told of it; returns whether it had not."""
        return self._queue.withdraw(self)

    # What follows is for the queue.

    def has_ended(self, read: PageRead, is_there: bool) -> bool:
        """One of its reads is over; returns whether all of them are."""
        if not is_there:
            self._failed.append(read)
        self._left.discard(read)
        return not self._left

    def give_up(self) -> None:
        """The kernel will not read what is left."""
        self._failed += self._left
        self._left.clear()
