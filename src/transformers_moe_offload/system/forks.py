"""A process may fork at any time, as the workers of a `DataLoader` do, and it and its child both go on.

A child has only the thread that forked. So no other thread of ours may be in the middle of a step then: a lock that it
holds would stay locked in the child, its reads would never arrive there, and data that a disk writes into private
memory during a fork may end up in the other process (open(2), about `O_DIRECT`). Therefore a fork waits until the reads
in flight have ended and takes all locks meanwhile, outer ones first.

A fork that a C library makes by itself is not noticed. A fork that only starts another program, as `subprocess` does,
need not be noticed.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakSet


class Lock(Protocol):
    """A lock of `threading`."""

    def acquire(self) -> bool:
        """Wait until the lock is free, and take it."""

    def release(self) -> None:
        """Release the lock."""


class Forkable(Protocol):
    """Something whose threads, or reads, have to rest while the process forks."""

    def before_fork(self) -> None:
        """Begin nothing more, and wait for what has begun."""

    def after_fork(self, *, is_child: bool) -> None:
        """Go on."""


class Rank(IntEnum):
    """A thread that holds a lock may wait for one of a higher rank, and for the locks of forkables."""

    RESIZING = 0
    BUILDING = 1
    TURN = 2
    SHORT = 3
    """Held for as long as it takes to open a file, and never by a thread that waits for another lock."""


L = TypeVar("L", bound=Lock)


class HeldInterrupts:
    """Delays a Ctrl-C that comes while the main thread forks.

    Python drops exceptions raised in the functions that it calls at a fork, and forks all the same: with half of the
    locks not taken, or with locks left locked.
    """

    DELAY_S = 0.01
    """Time for Python to leave those functions."""

    def __init__(self) -> None:
        self._handler: Any = None
        self._has_come = False

    def hold(self) -> None:
        """Begin to delay Ctrl-C."""
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._has_come = False
            self._handler = signal.signal(signal.SIGINT, self._note)

    def let_go(self, is_child: bool) -> None:
        """Stop delaying, and deliver a Ctrl-C that came meanwhile; not in a child, which did not exist then."""
        if self._handler is None or threading.current_thread() is not threading.main_thread():
            return
        handler, self._handler = self._handler, None
        signal.signal(signal.SIGINT, handler)
        if self._has_come and not is_child:
            threading.Timer(self.DELAY_S, _thread.interrupt_main).start()

    def _note(self, *_: object) -> None:
        self._has_come = True


class Forks:
    """What rests, and which locks are taken, while this process forks."""

    def __init__(self) -> None:
        self._locks: dict[Rank, WeakSet[Lock]] = {rank: WeakSet() for rank in Rank}
        self._forkables: WeakSet[Forkable] = WeakSet()
        self._entering = threading.Lock()
        self._forking = threading.RLock()
        self._let_go: list[Callable[..., None]] = []
        """What undoes the steps that `before` has taken; called with `is_child`."""
        self._interrupts = HeldInterrupts()

    def with_lock(self, lock: L, rank: Rank) -> L:
        """Take a lock at every fork, until the last reference to it is gone."""
        with self._entering:
            self._locks[rank].add(lock)
        return lock

    def enter(self, forkable: Forkable) -> None:
        """Have something rest at every fork, until the last reference to it is gone."""
        with self._entering:
            self._forkables.add(forkable)

    def before(self) -> None:
        """The calling thread is about to fork."""
        self._interrupts.hold()
        self._take(self._forking)
        for rank in (Rank.RESIZING, Rank.BUILDING, Rank.TURN):
            self._take_all(rank)
        with self._entering:
            forkables = list(self._forkables)
        for forkable in forkables:
            forkable.before_fork()
            self._let_go.append(forkable.after_fork)
        self._take_all(Rank.SHORT)
        self._take(self._entering)

    def after(self, *, is_child: bool) -> None:
        """The calling thread has forked: undo the steps of `before`, the latest first."""
        steps, self._let_go = self._let_go, []  # with the first of them undone, another thread may fork
        for undo in reversed(steps):
            undo(is_child=is_child)
        self._interrupts.let_go(is_child)

    def _take_all(self, rank: Rank) -> None:
        with self._entering:
            locks = list(self._locks[rank])
        for lock in locks:
            self._take(lock)

    def _take(self, lock: Lock) -> None:
        lock.acquire()
        self._let_go.append(lambda is_child: lock.release())


FORKS = Forks()
"""The forks of this process."""

if hasattr(os, "register_at_fork"):  # not on Windows, which knows no forks
    os.register_at_fork(
        before=FORKS.before,
        after_in_parent=partial(FORKS.after, is_child=False),
        after_in_child=partial(FORKS.after, is_child=True),
    )
