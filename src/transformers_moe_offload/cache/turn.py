"""Take a lock only if it is free, in a way that Ctrl-C cannot leave it locked.

Between `lock.acquire(blocking=False)` and the `try` behind it the main thread may be interrupted, and the lock stays
locked then. A `with` statement has no such gap as long as what it calls is not written in Python: the interpreter looks
for signals when a Python function begins, and when a call in Python code returns (`Python/ceval.c`, 3.11). So `with`
takes and releases the lock here by calling builtins only; the code in Python runs before that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any


class IsTakenError(Exception):
    """Another thread has the lock."""


class _Taken(dict[bool, bool]):
    """Gives True for True, and raises for anything else."""

    def __missing__(self, key: bool) -> bool:
        raise IsTakenError


_TAKEN = _Taken({True: True})


class Attempt:
    """A lock for a `with` block, which raises `IsTakenError` where it would have to wait."""

    def __init__(self, lock: threading.Lock | threading.RLock) -> None:
        self._lock = lock

    # `with` calls the objects that these two return. They are builtins, and the lock is not taken before.

    @property
    def __enter__(self) -> Callable[[], Any]:
        return partial(next, map(_TAKEN.__getitem__, map(self._lock.acquire, (False,))))

    @property
    def __exit__(self) -> Callable[..., Any]:
        return self._lock.__exit__
