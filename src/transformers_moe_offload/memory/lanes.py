"""Threads that read, and one expert on its way through them.

An expert that is read in several chunks takes several lanes at once. It has arrived when its last chunk has; if one
fails, those that have not begun are dropped, and the failure is told when nobody writes into its memory any more.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from transformers_moe_offload.memory.forks import Threads

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


class Lanes:
    """Reader threads. They take what was started first, first, and end when nobody refers to them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._threads = Threads(number, "moe-offload-read")

    def start(
        self,
        chunks: Sequence[Callable[[], None]],
        complete: Callable[[], int],
        give_up: Callable[[], None] = lambda: None,
    ) -> Read:
        """Begin to read an expert: `chunks` in any order and at once, then `complete`, which returns the bytes that
        came from files. `give_up` is called instead, if that is not to be."""
        read = Read(chunks, complete, give_up)
        for _ in chunks or (complete,):
            self._threads.submit(read.help)
        return read


class Read:
    """One expert on its way. Threads of the pool read its chunks, and so does whoever waits for it."""

    def __init__(
        self, chunks: Sequence[Callable[[], None]], complete: Callable[[], int], give_up: Callable[[], None]
    ) -> None:
        self.seconds = 0.0
        """How long lanes were busy with it, all of them together."""
        self._waiting: deque[Callable[[], None]] = deque(chunks or (self._do_complete,))
        self._complete = complete
        self._give_up = give_up
        self._num_running = 0
        self._has_begun = False
        self._is_completing = not chunks
        self._error: BaseException | None = None
        self._from_files = 0
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def is_done(self) -> bool:
        """Whether `finish` would return at once."""
        return self._is_over.is_set()

    def finish(self) -> int:
        """Read what nobody has begun to read (waiting for a thread to do it would take longer), wait for the rest, and
        return the bytes that came from files, or raise what went wrong."""
        self.help()
        self._is_over.wait()
        if self._error is not None:
            raise self._error
        return self._from_files

    def cancel(self) -> bool:
        """Give it up if nobody has begun; returns whether nobody had."""
        with self._lock:
            if self._has_begun:
                return False
            self._has_begun = True
            self._waiting.clear()
        self._give_up()
        return True

    def help(self) -> None:
        """Read chunks as long as there are any that nobody reads."""
        while (work := self._take()) is not None:
            self._run(work)

    def _take(self) -> Callable[[], None] | None:
        with self._lock:
            if not self._waiting:
                return None
            self._has_begun = True
            self._num_running += 1
            return self._waiting.popleft()

    def _run(self, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        error = None
        try:
            work()
        except Exception as raised:
            error = raised
        except BaseException:  # Ctrl-C while somebody waits: the read is not over, and may be waited for again
            with self._lock:
                self._num_running -= 1
                self._waiting.appendleft(work)
            raise
        self._ended(error, time.perf_counter() - began)

    def _ended(self, error: Exception | None, seconds: float) -> None:
        with self._lock:
            self._num_running -= 1
            self.seconds += seconds
            if error is not None:
                self._error = self._error or error
                self._waiting.clear()
            if self._num_running or self._waiting:
                return
            if self._error is None and not self._is_completing:
                self._is_completing = True
                self._waiting.append(self._do_complete)
                return
        if self._error is not None:
            self._give_up()
        self._is_over.set()

    def _do_complete(self) -> None:
        self._from_files = self._complete()
