"""Threads that read, and one expert on its way through them.

An expert that is read in several chunks takes several lanes at once. It has arrived when its last chunk has; if one
fails, those that have not begun are dropped, and the failure is told when nobody writes into its memory any more.

Ctrl-C can end the main thread's work between any two lines, so nothing here depends on a line that comes later: each
step of a read is claimed, and later noted, by one operation that is done or not done, a step can be done again, and
no lock is held. Python's own executors, events and conditions do not promise that: a main thread that is interrupted
inside of one of them can leave its lock locked, and every lane waiting for it. ReaderPool are never interrupted.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from transformers_moe_offload.disk_io.read import Read, Work
from transformers_moe_offload.system.forks import FORKS

MOST_LANES = 4
"""Four saturate what one NVMe drive gives to reads of several MiB; Transformers' own loader settled on the same."""

LEAST_CHUNK = 1 << 20
"""Bytes; an expert is not divided into smaller chunks for the sake of idle lanes. One of 4.5 MiB, alone on its way past
the page cache of a virtual disk: 3.7 ms whole, 3.5 in two, and no faster in chunks of 512 KiB (two lanes)."""


def default_workers() -> int:
    """Reader threads where the user names no number: one per core, at most four. More take the cores from arithmetic:
    on two cores, four made decoding from the page cache 1.05 times slower."""
    return min(MOST_LANES, os.cpu_count() or 1)


def chunk_bytes(nbytes: int, num_lanes: int, alongside: int) -> int | None:
    """How large a chunk of an expert should be that `alongside` others are on their way with; None: read it whole.

    So large that all lanes, and whoever waits, get something to do. That is worth something when few experts are
    missing: decoding from a cold disk past the page cache (experts of 4.5 MiB, medians of 40 tokens in turns) took 0.90
    to 0.96 of the time of whole reads at 1.8 misses per layer, with two lanes and with four; at 2.9 misses 0.92 with
    four lanes and 1.02 with two: single comparisons on a virtual disk. Dividing every expert in two was within 1 to 2
    ms of that, and from the page cache none of it matters.
    """
    number = min(-(-(num_lanes + 1) // (1 + alongside)), nbytes // LEAST_CHUNK)
    return -(-nbytes // number) if number > 1 else None


class ReaderPool:
    """Reader threads. They take what was started first, first, and end when nobody refers to them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._crew: _Crew | None = None
        self._unfinished: set[Read] = set()

    def start(
        self,
        chunks: Sequence[Callable[[], None]],
        complete: Callable[[], int],
        give_up: Callable[[], None] = lambda: None,
    ) -> Read:
        """Begin to read an expert: `chunks` in any order and at once, then `complete`, which returns the bytes that
        came from files. `give_up` is called instead, if that is not to be. All of it may be done twice."""
        return self._started(Read(chunks, complete, give_up, crew=self._living_crew(), unfinished=self._unfinished))

    def open(self, opened: Callable[[], Work]) -> Read:
        """Begin to read an expert in a way that Ctrl-C must never end in the middle: a lane finds out what it takes,
        and only lanes do it."""
        read = Read((), _nothing, crew=self._living_crew(), unfinished=self._unfinished)
        read.opens(opened)
        return self._started(read)

    def drain(self) -> None:
        """Wait until no thread writes into the memory of any expert that was started; those not begun are given up."""
        for read in list(self._unfinished):
            if not read.cancel():
                with suppress(Exception):  # told to whoever asked for it, if it still matters
                    read.finish()

    def _started(self, read: Read) -> Read:
        self._unfinished.add(read)
        read.call(read.num_steps)
        return read

    def _living_crew(self) -> _Crew:
        """The threads; others, in a process that was forked from the one that started them."""
        if self._crew is None or not self._crew.is_here():
            self._crew = crew = _Crew(self.number, self._unfinished)
            weakref.finalize(self, crew.dismiss).atexit = False
        return self._crew


class _Crew:
    """The threads of some lanes, in the process that started them."""

    def __init__(self, number: int, unfinished: set[Read]) -> None:
        self._number = number
        self._unfinished = unfinished
        self._calls: SimpleQueue[Read | None] = SimpleQueue()
        self._process = os.getpid()
        self._threads: list[threading.Thread] = []
        self._working: list[threading.Lock] = []
        """Of each thread, held while it does something."""
        self._resting: list[threading.Lock] = []
        """Those of them that a fork has taken."""
        self._num_ends = 0
        """How often threads were told to end; that stays among the calls, for the next thread."""
        # By a thread that Ctrl-C does not reach: `Thread.start` is one of the things that must not be interrupted.
        start_new_thread(self._begin, (number,))
        FORKS.enter(self)

    def is_here(self) -> bool:
        """Whether it was started in this process."""
        return self._process == os.getpid()

    def call(self, read: Read) -> None:
        """Have one more thread do what is left of a read."""
        self._calls.put(read)

    def before_fork(self) -> None:
        """Wait until all that was called for is done, and let nothing begin until `after_fork`.

        No lock is held while a thread works: what it does may wait for what another one has yet to do.
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
        """Go on. In a child others do what was not begun, as these threads are not there."""
        taken, self._resting = self._resting, []
        for lock in taken:
            lock.release()
        if is_child and self._unfinished:
            crew = _Crew(self._number, self._unfinished)
            for read in list(self._unfinished):
                read.belongs_to(crew)
            crew.dismiss()

    def dismiss(self) -> None:
        """Threads end after what they are doing."""
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
        """Before the interpreter goes: no thread may be reading into memory that goes with it."""
        self._num_ends += 1
        self._calls.put(None)
        for thread in self._threads:
            thread.join()


def _serve(calls: SimpleQueue[Read | None], working: threading.Lock) -> None:
    while (read := calls.get()) is not None:
        with working:
            read.help()
        del read  # and with it the memory that it was read into
    calls.put(None)  # for the next one


_LOOK_AGAIN_S = 0.0005
"""A fork looks so often whether lanes have done what they were called for; a chunk takes as long, or longer."""


def _nothing() -> int:
    return 0
