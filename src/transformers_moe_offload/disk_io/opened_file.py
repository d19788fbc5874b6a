"""Files that are open for reading: is each still the file whose header was read, and how many are open at once?

Two fine-tunes of one model have files of equal names and sizes, so neither tells whether a path still leads to the file
whose header was read. A file counts as the same if its inode, its length and its time of modification are the same.

On a filesystem that gives one file several inode numbers (some that run in user space do), opening it again is an
error: nothing there tells a file from its replacement.

A file is compared when it is opened, and at most a hundred times a second while it is used: on two busy cores a
check took 0.06 ms. Bytes that are written between two checks are read as they are.

A model comes in a few files, a thousand adapters come in a thousand, and many systems let a process have 1,024. Those
that were opened first are closed first; the next read opens them again.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.system.forks import FORKS, Rank

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LOOK_EVERY = 0.01
"""Seconds."""

_OWN_DESCRIPTORS = Path("/proc/self/fd")
"""Where Linux lists the open files of a process, by descriptor, also after their paths have changed."""

_HANDLES_PER_FILE = 3
"""One for reads, one for the mapping, and one for reads past the page cache."""

_LIMIT_WITHOUT_LIMITS = 512
"""Open files of a process on a system that does not tell its limit: what Windows' C library allows at first."""


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """What a file was when its header was read."""

    nbytes: int
    device: int
    inode: int
    modified_ns: int | None
    """When it was last written to, in nanoseconds since 1970; None where that does not matter."""

    @classmethod
    def of(cls, descriptor: int) -> FileIdentity:
        """The identity of an open file."""
        found = os.fstat(descriptor)
        return cls(nbytes=found.st_size, device=found.st_dev, inode=found.st_ino, modified_ns=found.st_mtime_ns)

    def whenever_written(self) -> FileIdentity:
        """The same for a file that may be written to."""
        return replace(self, modified_ns=None)

    def is_of(self, descriptor: int) -> bool:
        """Whether an open file is the same, and was not written to since."""
        return self._found(descriptor) == self

    def expect(self, descriptor: int, path: Path) -> None:
        """Raise `CheckpointError` if the file that was opened as `path` is another one, or was written to since."""
        found = self._found(descriptor)
        if found == self:
            return
        differences = []
        if found.nbytes != self.nbytes:
            differences.append(f"has {found.nbytes:,} bytes, but had {self.nbytes:,}")
        if found.modified_ns != self.modified_ns:
            differences.append(f"was written at {_time(found.modified_ns)}, but had been at {_time(self.modified_ns)}")
        if (found.device, found.inode) != (self.device, self.inode):
            differences.append(
                f"is inode {found.inode} of device {found.device}, but was inode {self.inode} of device {self.device}"
            )
        raise CheckpointError(
            f"{path} is not what it was when the model was loaded: it {'; it '.join(differences)}. Load the model "
            f"again, or put the original file back"
        )

    def _found(self, descriptor: int) -> FileIdentity:
        found = FileIdentity.of(descriptor)
        return found.whenever_written() if self.modified_ns is None else found


def _time(nanoseconds: int | None) -> str:
    """Down to the nanosecond: the times of files that are written one after the other differ by little."""
    seconds, rest = divmod(nanoseconds or 0, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09} UTC"


class OpenedFile:
    """Closed when its last reference is gone, so reads that use it finish first.

    Raises `CheckpointError` if `path` leads to another file than the one with this `identity`.
    """

    def __init__(self, path: Path, identity: FileIdentity) -> None:
        self.path = path
        self.identity = identity
        self._raw = path.open("rb", buffering=0)
        self.descriptor = self._raw.fileno()
        weakref.finalize(self, self._raw.close)
        identity.expect(self.descriptor, path)
        self._was_unchanged = True
        self._look_again = time.monotonic() + LOOK_EVERY
        self._seeking = threading.Lock()
        if hasattr(os, "posix_fadvise"):
            # Experts are read in no order. With the 8 MiB of readahead that some systems are set to, 1.4 times the
            # wanted bytes came from a cold disk, at 0.8 GiB/s of wanted ones; without it 1.0 times, at 1.1 GiB/s.
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def place(self) -> Path:
        """A path for opening this very file in another way, even if it was moved or replaced since it was opened."""
        own = _OWN_DESCRIPTORS / str(self.descriptor)
        return own if own.exists() else self.path

    def size(self) -> int:
        """Bytes of the file, now."""
        return os.fstat(self.descriptor).st_size

    def is_unchanged(self, now: float) -> bool:
        """Whether the file was the same at the last check: not written to, and not cut short; `now` is the time in
        seconds of `time.monotonic`."""
        if now > self._look_again:
            self._was_unchanged = self.identity.is_of(self.descriptor)
            self._look_again = now + LOOK_EVERY
        return self._was_unchanged

    def expect_unchanged(self) -> None:
        """Raise `CheckpointError` if it has changed."""
        if not self.is_unchanged(time.monotonic()):
            self.identity.expect(self.descriptor, self.path)

    def read_into(self, targets: list[memoryview], offset: int) -> int:
        """Read once; returns the number of bytes, 0 at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, targets, offset)
        with self._seeking:  # Windows has no positioned read in the standard library
            self._raw.seek(offset)
            return self._raw.readinto(targets[0]) or 0

    def read_cached(self, targets: Sequence[memoryview], offset: int) -> int:
        """Read what is in the page cache; returns the number of bytes, or raises `OSError`."""
        if not hasattr(os, "RWF_NOWAIT"):
            return 0
        return os.preadv(self.descriptor, targets, offset, os.RWF_NOWAIT)

    def announce(self, offset: int, nbytes: int) -> bool:
        """Begin to read ahead; False where the system offers no such thing."""
        if not hasattr(os, "posix_fadvise"):
            return False
        os.posix_fadvise(self.descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
        return True


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
