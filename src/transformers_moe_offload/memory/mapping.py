"""A checkpoint file seen through the page cache, without copying it.

Pages are mapped when an expert is brought in and let go when it leaves, so that what the process holds is bounded by
the slots, while the kernel keeps the file's pages for as long as nobody else needs the memory. Mapping a cached expert
of 4.5 MiB takes 0.05 ms where reading it takes 0.55 (Linux 6.18, one Xeon core).

On Linux the pages are brought in by `madvise`, which reports what cannot be read; elsewhere they are touched.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from functools import cache
from pathlib import Path

import torch

from transformers_moe_offload.errors import CheckpointError

_WILLNEED, _DONTNEED, _POPULATE_READ = 3, 4, 22
"""Advice of madvise(2); the last one is of Linux 5.14."""

_PIECE = 128 << 10
"""Bytes announced to the kernel at once: it cuts longer requests to the readahead of the device, 128 KiB by default."""


class FileMap:
    """One file, mapped privately: nothing that is done to the tensors reaches the file."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        with path.open("rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != nbytes:
                raise changed_size(path, found, nbytes)
            self._map = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        """The file's bytes, (nbytes,) uint8."""
        self._base = self.bytes.data_ptr()

    def is_whole(self) -> bool:
        """Whether the file has not been cut short meanwhile: touching what is gone would end the process."""
        return self._map.size() >= len(self.bytes)

    def bring_in(self, start: int, stop: int) -> None:
        """Map the pages of these bytes, reading those that are not in the page cache, or raise `CheckpointError`."""
        if not self.is_whole():
            raise changed_size(self.path, self._map.size(), len(self.bytes))
        first, last = _outward(start, stop, len(self.bytes))
        try:
            if not self._is_cached(first, last):
                for piece in range(first, last, _PIECE):
                    self._advise(piece, min(piece + _PIECE, last), _WILLNEED)
            self._advise(first, last, _POPULATE_READ)
        except NotImplementedError:
            self.bytes[first : last : mmap.PAGESIZE].sum()
        except OSError as error:
            raise CheckpointError(
                f"cannot read {self.path} up to byte {stop:,}: {error.strerror}; restore the file and try again"
            ) from error

    def let_go(self, start: int, stop: int) -> None:
        """Unmap the pages that hold nothing but these bytes; they come back when they are touched."""
        first, last = _inward(start, stop)
        if first < last:
            try:
                self._advise(first, last, _DONTNEED)
            except NotImplementedError:
                return  # the pages stay mapped; the kernel takes them back when it needs the memory

    def _advise(self, first: int, last: int, advice: int) -> None:
        libc = _libc()
        if libc is None:
            raise NotImplementedError
        if libc.madvise(self._base + first, last - first, advice) != 0:
            number = ctypes.get_errno()
            if number == errno.EINVAL:
                raise NotImplementedError  # a kernel that does not know this advice
            raise OSError(number, os.strerror(number))

    def _is_cached(self, first: int, last: int) -> bool:
        libc = _libc()
        if libc is None:
            return True
        pages = (ctypes.c_ubyte * (-(-(last - first) // mmap.PAGESIZE)))()
        if libc.mincore(self._base + first, last - first, pages) != 0:
            return True
        return 0 not in bytes(pages)


def changed_size(path: Path, found: int, expected: int) -> CheckpointError:
    """The error for a file that is not as long as it was."""
    return CheckpointError(
        f"{path} has {found:,} bytes, but had {expected:,} when the model was loaded; "
        f"restore the file, or load the model again"
    )


def _outward(start: int, stop: int, end: int) -> tuple[int, int]:
    """The pages that hold any of these bytes."""
    return start // mmap.PAGESIZE * mmap.PAGESIZE, min(end, -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE)


def _inward(start: int, stop: int) -> tuple[int, int]:
    """The pages that hold nothing but these bytes."""
    return -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, whose calls release the GIL; None where its `madvise` is not Linux's."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return libc
