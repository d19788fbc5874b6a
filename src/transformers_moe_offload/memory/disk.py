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
from pathlib import Path

from transformers_moe_offload.errors import CheckpointError


class File:
    """One file, opened when first read and closed with its last user."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        """Size of the file when it was indexed."""
        self._lock = threading.Lock()
        self._opened: _Opened | None = None

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the file's bytes from `offset` on, or raise `CheckpointError`."""
        try:
            self._fill(self._open(), target, offset)
        except OSError as error:
            self.close()
            raise CheckpointError(
                f"cannot read {self.path}: {error.strerror}; restore the file and try again"
            ) from error
        except CheckpointError:
            self.close()
            raise

    def _fill(self, opened: _Opened, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            count = opened.read_into(target[done:], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ends at byte {opened.size():,}, but an expert's weights reach "
                    f"to byte {offset + len(target):,}; restore the file and try again"
                )
            done += count

    def close(self) -> None:
        """Forget the open file; reads that use it finish first, the next read opens it again."""
        with self._lock:
            self._opened = None

    def _open(self) -> _Opened:
        with self._lock:
            if self._opened is None:
                opened = _Opened(self.path)
                if opened.size() != self.nbytes:
                    raise CheckpointError(
                        f"{self.path} has {opened.size():,} bytes, but had {self.nbytes:,} when the model was loaded; "
                        f"restore the file, or load the model again"
                    )
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

    def size(self) -> int:
        return os.fstat(self._raw.fileno()).st_size

    def read_into(self, target: memoryview, offset: int) -> int:
        """Read once; returns the number of bytes, 0 at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self._raw.fileno(), [target], offset)
        with self._seeking:  # Windows has no positioned read in the standard library
            self._raw.seek(offset)
            return self._raw.readinto(target) or 0
