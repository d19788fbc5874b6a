"""Read byte ranges of checkpoint files into memory that is already there.

`pread` with the GIL released, from any number of threads: no page faults in the middle of a matmul, no readahead that
nobody asked for, and no shared file position. Files are opened on first use and must stay what they were when the
checkpoint was indexed; a file that vanished, shrank or was replaced by one of another size is an error at the read
that needs it, and is looked for again at the next read.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.memory.mapping import FileMap, changed_size


class File:
    """One file, opened when first read and closed with its last user."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        """Size of the file when it was indexed."""
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        self._map: FileMap | None = None

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the file's bytes from `offset` on, or raise `CheckpointError`."""
        self.scatter_into([target], offset)

    def scatter_into(self, targets: Sequence[memoryview], offset: int) -> None:
        """Fill several targets, one after the other, with the file's bytes from `offset` on, in one read."""
        try:
            self._fill(self._open(), list(targets), offset)
        except OSError as error:
            self.close()
            raise self._unreadable(error) from error
        except CheckpointError:
            self.close()
            raise

    def mapped(self) -> FileMap:
        """The whole file, mapped; a file that was cut short since is looked for again."""
        with self._lock:
            if self._map is None or not self._map.is_whole():
                self._map = None
                try:
                    self._map = FileMap(self.path, self.nbytes)
                except OSError as error:
                    raise self._unreadable(error) from error
            return self._map

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot read {self.path}: {error.strerror}; restore the file and try again")

    def _fill(self, opened: _Opened, targets: list[memoryview], offset: int) -> None:
        end = offset + sum(len(target) for target in targets)
        while offset < end:
            count = opened.read_into(targets, offset)
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ends at byte {opened.size():,}, but an expert's weights reach "
                    f"to byte {end:,}; restore the file and try again"
                )
            offset += count
            targets = _without_first(targets, count)

    def close(self) -> None:
        """Forget the open file; reads that use it finish first, the next read opens it again."""
        with self._lock:
            self._opened = None
            self._map = None

    def _open(self) -> _Opened:
        with self._lock:
            if self._opened is None:
                opened = _Opened(self.path)
                if opened.size() != self.nbytes:
                    raise changed_size(self.path, opened.size(), self.nbytes)
                self._opened = opened
            return self._opened

    def __deepcopy__(self, memo: dict[int, object]) -> File:
        return self  # read-only and thread-safe, so copies of a model share it

    def __reduce__(self) -> tuple[type[File], tuple[Path, int]]:
        return File, (self.path, self.nbytes)


class _Opened:
    """An open file that closes itself when the last thread that reads it lets go."""

    def __init__(self, path: Path) -> None:
        self._raw = path.open("rb", buffering=0)
        self._seeking = threading.Lock()
        weakref.finalize(self, self._raw.close)
        if hasattr(os, "posix_fadvise"):
            # Experts are read in no order. With the 8 MiB of readahead that some systems are set to, 1.4 times the
            # wanted bytes came from a cold disk, at 0.8 GiB/s of wanted ones; without it 1.0 times, at 1.1 GiB/s.
            os.posix_fadvise(self._raw.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def size(self) -> int:
        return os.fstat(self._raw.fileno()).st_size

    def read_into(self, targets: list[memoryview], offset: int) -> int:
        """Read once; returns the number of bytes, 0 at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self._raw.fileno(), targets, offset)
        with self._seeking:  # Windows has no positioned read in the standard library
            self._raw.seek(offset)
            return self._raw.readinto(targets[0]) or 0


def _without_first(targets: list[memoryview], count: int) -> list[memoryview]:
    """What is left to fill once the first `count` bytes are there."""
    while targets and count >= len(targets[0]):
        count -= len(targets[0])
        targets = targets[1:]
    return [targets[0][count:], *targets[1:]] if targets else []
