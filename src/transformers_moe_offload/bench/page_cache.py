"""Put files into the page cache, or out of it, and see how much of them is in it. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

CHUNK = 8 << 20
_PAGEOUT = 21  # MADV_PAGEOUT, Linux 5.4, not in Python's mmap module


def can_drop() -> bool:
    """Whether this system can drop files from the page cache."""
    return sys.platform == "linux"


def warm(files: Iterable[Path]) -> None:
    """Read the files from end to end."""
    buffer = bytearray(CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def drop(files: Iterable[Path]) -> None:
    """Ask the kernel to drop the files from the page cache.

    `posix_fadvise(DONTNEED)` alone does not drop pages that this process has mapped, so the mappings are paged out
    first. Dirty pages stay: call `os.sync()` after writing.
    """
    files = list(files)
    _page_out_mappings({str(file.resolve()) for file in files})
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(files: Iterable[Path]) -> float:
    """How much of the files the page cache holds, from 0 to 1."""
    resident = pages = 0
    for file in files:
        with (
            file.open("rb") as stream,
            contextlib.closing(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)) as mapped,
        ):
            count = -(-len(mapped) // mmap.PAGESIZE)
            flags = np.empty(count, dtype=np.uint8)
            view = np.frombuffer(mapped, dtype=np.uint8)
            address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
            if _libc().mincore(address, length, ctypes.c_void_p(flags.ctypes.data)) != 0:
                raise OSError(ctypes.get_errno(), f"mincore of {file}")
            del view
            resident += int((flags & 1).sum())
            pages += count
    return resident / pages if pages else 0.0


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _page_out_mappings(paths: set[str]) -> None:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0] in paths:
            start, end = (int(address, 16) for address in span.split("-"))
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
