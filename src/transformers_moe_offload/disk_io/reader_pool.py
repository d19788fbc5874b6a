"""Reader threads: how many there are, how large their chunks are, and how they outlive forks.

They do the steps of reads, which `read.py` describes. Ctrl-C can end the main thread's work between any two lines, but
never interrupts a reader thread.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from transformers_moe_offload.disk_io.read import Read, Work
from transformers_moe_offload.system.forks import FORKS

MOST_LANES = 4
"""Four saturate what one NVMe drive gives to reads of several MiB; Transformers' own loader settled on the same."""

LEAST_CHUNK = 1 << 20
"""Bytes; an expert is not divided into smaller chunks for the sake of idle threads. One of 4.5 MiB, alone in flight
past the page cache of a virtual disk: 3.7 ms whole, 3.5 in two, and no faster in chunks of 512 KiB (two threads)."""


def default_workers() -> int:
    """Reader threads where the user names no number: one per core, at most four. More take the cores from arithmetic:
    on two cores, four made decoding from the page cache 1.05 times slower."""
    return min(MOST_LANES, os.cpu_count() or 1)


def chunk_bytes(nbytes: int, num_lanes: int, alongside: int) -> int | None:
    """Bytes of a chunk of an expert while `alongside` other experts are in flight; None: read it whole.

    So large that all reader threads and the waiting thread get something to do. That helps when few experts are
    missing: decoding from a cold disk past the page cache (experts of 4.5 MiB, medians of 40 tokens in turns) took 0.90
    to 0.96 of the time of whole reads at 1.8 misses per layer, with two reader threads and with four; at 2.9 misses
    0.92 with four and 1.02 with two: single comparisons on a virtual disk. Dividing every expert in two was within 1 to
    2 ms of that, and from the page cache it makes no difference.
    """
    number = min(-(-(num_lanes + 1) // (1 + alongside)), nbytes // LEAST_CHUNK)
    return -(-nbytes // number) if number > 1 else None


class ReaderPool:
    """Reader threads. They take reads in the order of their start, and end with the last reference to the pool."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._crew: _Crew | None = None
        self._unfinished: set[Read] = set()

    def start(self, work: Work) -> Read:
        """Begin to read an expert."""
        return self._started(Read(work, self._living_crew(), self._unfinished))

    def open(self, opened: Callable[[], Work]) -> Read:
        """Begin to read an expert that Ctrl-C must never interrupt in the middle: a reader thread calls `opened`, which
        returns the steps, and only reader threads do them."""
        read = Read(Work((), int), self._living_crew(), self._unfinished)  # `int` returns 0
        read.opens(opened)
        return self._started(read)

    def drain(self) -> None:
        """Cancel reads that have not begun, and wait until no thread writes into the memory of the others."""
        for read in list(self._unfinished):
            if not read.cancel():
                with suppress(Exception):  # `finish` raises it again for a caller that still waits
                    read.finish()

    def _started(self, read: Read) -> Read:
        self._unfinished.add(read)
        read.call(read.num_steps)
        return read

    def _living_crew(self) -> _Crew:
        """The threads; new ones in a process that was forked from the one that started them."""
        if self._crew is None or not self._crew.is_here():
            self._crew = crew = _Crew(self.number, self._unfinished)
            weakref.finalize(self, crew.dismiss).atexit = False
        return self._crew


class _Crew:
    """The threads of a pool, in the process that started them."""

    def __init__(self, number: int, unfinished: set[Read]) -> None:
        self._number = number
        self._unfinished = unfinished
        self._calls: SimpleQueue[Read | None] = SimpleQueue()
        self._process = os.getpid()
        self._threads: list[threading.Thread] = []
        self._working: list[threading.Lock] = []
        """A lock for each thread, held while the thread works."""
        self._resting: list[threading.Lock] = []
        """The locks of `_working` while a fork holds them."""
        self._num_ends = 0
        """How often threads were told to end; each such None stays among the calls, for the next thread."""
        # On a thread that Ctrl-C does not reach: `Thread.start` must not be interrupted.
        start_new_thread(self._begin, (number,))
        FORKS.enter(self)

    def is_here(self) -> bool:
        """Whether it was started in this process."""
        return self._process == os.getpid()

    def call(self, read: Read) -> None:
        """Have one more thread do the remaining steps of a read."""
        self._calls.put(read)

    def before_fork(self) -> None:
        """Wait until all calls are done, and let no step begin until `after_fork`.

        No lock is held here while a thread works: its step may wait for a step of another thread.
        """
        while self.is_here():
            taken = [lock for lock in self._working if lock.acquire(blocking=False)]
            if len(taken) == len(self._working) and self._calls.qsize() <= self._num_ends:
                self._resting = taken
                return
            for lock in taken:
                lock.release()
            time.sleep(_LOOK_AGAIN_S)

    def after_fork(self, *, is_child: bool) -> None:
        """Go on. A child has none of these threads: new ones do its unfinished reads."""
        taken, self._resting = self._resting, []
        for lock in taken:
            lock.release()
        if is_child and self._unfinished:
            crew = _Crew(self._number, self._unfinished)
            for read in list(self._unfinished):
                read.belongs_to(crew)
            crew.dismiss()

    def dismiss(self) -> None:
        """Have the threads end after the calls made so far."""
        atexit.unregister(self._end)
        self._num_ends += 1
        self._calls.put(None)

    def _begin(self, number: int) -> None:
        calls = self._calls
        atexit.register(self._end)
        try:
            for n in range(number):
                working = threading.Lock()
                self._working.append(working)
                args = calls, working
                thread = threading.Thread(target=_serve, args=args, name=f"moe-offload-read_{n}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # the system has no more threads
            if not self._threads:
                _serve(calls, self._working[0])

    def _end(self) -> None:
        """End the threads before the interpreter does: none may read into memory that is freed then."""
        self._num_ends += 1
        self._calls.put(None)
        for thread in self._threads:
            thread.join()


def _serve(calls: SimpleQueue[Read | None], working: threading.Lock) -> None:
    while (read := calls.get()) is not None:
        with working:
            read.help()
        del read  # and with it the memory that it was read into
    calls.put(None)  # for the next thread


_LOOK_AGAIN_S = 0.0005
"""Seconds between a fork's checks whether reader threads are idle; a chunk takes as long, or longer."""
