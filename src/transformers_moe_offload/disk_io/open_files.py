"""How many files are open at once.

A model comes in a few files, a thousand adapters come in a thousand, and many systems let a process have 1,024. Those
that were opened first are closed first; the next read opens them again.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Protocol

from transformers_moe_offload.system.forks import FORKS, Rank

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_HANDLES_PER_FILE = 3
"""One for reads, one for the mapping, and one for reads past the page cache."""

_LIMIT_WITHOUT_LIMITS = 512


class _Closable(Protocol):
    def close(self) -> None:
        """Close all handles."""


class OpenFiles:
    """Files that are open, oldest first. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = FORKS.with_lock(threading.Lock(), Rank.SHORT)
        self._files: OrderedDict[int, weakref.ref[_Closable]] = OrderedDict()

    def add(self, file: _Closable) -> None:
        """Note that a file has been opened, and close the oldest where there are too many.

        Not to be called with a lock held that closing another file waits for.
        """
        with self._lock:
            self._files[id(file)] = weakref.ref(file)
            self._files.move_to_end(id(file))
            surplus = [self._files.popitem(last=False)[1] for _ in range(len(self._files) - self.limit)]
        for oldest in (reference() for reference in surplus):
            if oldest is not None and oldest is not file:
                oldest.close()


def default_limit() -> int:
    """Files that half of this process's handles are enough for; the other half is left to other code."""
    if resource is None:
        return _LIMIT_WITHOUT_LIMITS // _HANDLES_PER_FILE
    handles = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if handles == resource.RLIM_INFINITY:
        handles = 1 << 20
    return max(8, handles // 2 // _HANDLES_PER_FILE)


OPEN_FILES = OpenFiles(default_limit())
"""The open files of this process, which the limit applies to."""
