"""One expert in flight through reader threads.

An expert that is read in several chunks takes several threads at once. It is there when its last chunk is; if one
fails, chunks that have not begun are dropped, and the error is raised once no thread writes into its memory any more.

Ctrl-C can end the main thread's work between any two lines, so nothing here depends on a line that comes later: each
step of a read is claimed, and later marked as ended, by one atomic operation, a step can be repeated, and no lock is
held. Python's own executors, events and conditions do not promise that: a main thread that is interrupted inside of one
of them can leave its lock locked, and every reader thread waiting for it. Reader threads are never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple, Protocol


class Work(NamedTuple):
    """The steps of reading an expert. Each of them may be done twice."""

    chunks: Sequence[Callable[[], None]]
    """Called first, in any order and in parallel."""
    complete: Callable[[], int]
    """Called after the chunks; returns the bytes that came from files."""
    give_up: Callable[[], None] = lambda: None
    """Called instead of `complete` if a chunk failed or the read was cancelled."""


class Crew(Protocol):
    """Threads that do the remaining steps of reads."""

    def is_here(self) -> bool:
        """Whether they were started in this process."""

    def call(self, read: Read) -> None:
        """Have one more thread do the remaining steps of a read."""


class Read:
    """One expert in flight. Reader threads read its chunks, and so does the thread that waits for it, one at a time."""

    def __init__(self, work: Work, crew: Crew | None = None, unfinished: set[Read] | None = None) -> None:
        self._steps = list(work.chunks)
        self._complete = work.complete
        self._give_up = work.give_up
        self._crew = crew
        self._unfinished = set() if unfinished is None else unfinished
        self._is_for_all = True
        """Whether a waiting thread may do its steps, or only reader threads."""
        self._fate: dict[None, str] = {}
        """Begun or cancelled, whichever comes first."""
        self._claims: dict[int, _Claim] = {}
        """The claim on each step, by its number; the concluding step is `_LAST`."""
        self._ended: set[int] = set()
        self._error: BaseException | None = None
        self._from_files = 0
        self._seconds: list[float] = []
        self._is_over = False
        self._bell: SimpleQueue[None] = SimpleQueue()
        """Rung when it is over."""

    @property
    def num_steps(self) -> int:
        """Steps that can be done at once."""
        return len(self._steps) or 1

    @property
    def seconds(self) -> float:
        """How long threads were busy with it, all of them together."""
        return sum(self._seconds)

    def opens(self, opened: Callable[[], Work]) -> None:
        """Make `opened` its first step, which a reader thread does and which returns the other steps."""

        def opening() -> None:
            work = opened()
            self._complete, self._give_up = work.complete, work.give_up
            self._steps += work.chunks
            self.call(len(work.chunks) - 1)

        self._is_for_all = False
        self._steps.append(opening)

    def call(self, number: int) -> None:
        """Have so many reader threads help."""
        if self._crew is not None:
            for _ in range(number):
                self._crew.call(self)

    def belongs_to(self, crew: Crew) -> None:
        """In a forked process: have its own reader threads do the remaining steps."""
        self._drop_stale_claims()
        self._crew = crew
        self.call(self.num_steps)

    def is_done(self) -> bool:
        """Whether `finish` would return at once."""
        return self._is_over

    def finish(self) -> int:
        """Read the chunks that no thread has begun (waiting for one to do so would take longer), wait for the rest, and
        return the bytes that came from files, or raise the first error."""
        if self._fate.get(None) == _CANCELLED:  # by a `cancel` that was interrupted
            self.cancel()
        if not self._is_over:
            self._drop_stale_claims()
            if self._is_for_all:
                self._do_steps(is_lane=False)
            while not self._is_over:
                self._bell.get()
        if self._error is not None:
            raise self._error
        return self._from_files

    def cancel(self) -> bool:
        """Cancel it if no thread has begun; returns whether it is cancelled."""
        if self._fate.setdefault(None, _CANCELLED) != _CANCELLED:
            return False
        if not self._is_over:
            self._error = RuntimeError("the read was cancelled before it began")
            self._give_up()
            self._end()
        return True

    def help(self) -> None:
        """Do unclaimed steps as long as there are any; called on reader threads."""
        self._do_steps(is_lane=True)

    def _do_steps(self, *, is_lane: bool) -> None:
        if self._fate.setdefault(None, _BEGUN) == _CANCELLED:
            return
        claim = _Claim(is_lane)
        while (number := self._next(claim)) is not None:
            began = time.perf_counter()
            try:
                self._steps[number]()
            except BaseException as error:
                # Ctrl-C on a waiting thread: the read is not over, and may be waited for again.
                if not is_lane and not isinstance(error, Exception):
                    raise
                self._error = self._error or error
            self._seconds.append(time.perf_counter() - began)
            self._ended.add(number)
        self._conclude(claim)

    def _next(self, claim: _Claim) -> int | None:
        """Claim a step that no thread has claimed."""
        for number in range(len(self._steps)):
            if self._error is None and number not in self._claims and self._claims.setdefault(number, claim) is claim:
                if self._error is None:
                    return number
                self._ended.add(number)  # a step failed meanwhile, on a thread that may not have seen this claim
        return None

    def _conclude(self, claim: _Claim) -> None:
        """Complete it, or give it up, if no further step will be done and no other thread concludes it."""
        claimed = set(self._claims) - {_LAST}
        is_time = claimed <= self._ended and (self._error is not None or len(claimed) == len(self._steps))
        if not is_time or self._claims.setdefault(_LAST, claim) is not claim:
            return
        began = time.perf_counter()
        if self._error is None:
            try:
                self._from_files = self._complete()
            except Exception as error:
                self._error = error
        if self._error is not None:
            self._give_up()
        self._seconds.append(time.perf_counter() - began)
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._steps = []  # and what they hold
        self._unfinished.discard(self)
        self._bell.put(None)

    def _drop_stale_claims(self) -> None:
        """Drop claims on unfinished steps that were made by a waiting thread that was interrupted, or in the process
        that this one was forked from."""
        is_ours = self._crew is None or self._crew.is_here()
        for number, claim in list(self._claims.items()):
            if number not in self._ended and not (claim.is_lane and is_ours):
                del self._claims[number]


class _Claim:
    """One thread's claim on steps of a read."""

    def __init__(self, is_lane: bool) -> None:
        self.is_lane = is_lane


_LAST = -1
"""The number of the step that concludes a read."""

_BEGUN, _CANCELLED = "begun", "cancelled"
