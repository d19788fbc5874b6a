"""Read a file past the page cache (direct I/O).

If the experts do not fit into free RAM, the page cache can hold few of them, and costs a copy and an eviction at every
read: 4.5 MiB pieces of a cold file came at 1.0 GiB/s through it and at 1.3 to 2.0 past it (ext4 on a virtual disk, 1 to
4 threads). Offsets, lengths and addresses of direct reads have to be whole blocks of the disk, which divide a
page, so reads go through an aligned buffer, one for each thread.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

from transformers_moe_offload.system.host_memory import PAGE_BYTES, new_area


class DirectReader:
    """One file, opened for direct reads. Raises `OSError` where system or filesystem do not offer them."""

    def __init__(self, path: Path) -> None:
        if not hasattr(os, "O_DIRECT"):
            raise OSError("this system has no direct reads")
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        weakref.finalize(self, os.close, self.descriptor)

    def size(self) -> int:
        """Bytes of the file, now."""
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, nbytes: int) -> memoryview:
        """The file's bytes from `offset` on, fewer than `nbytes` at its end; valid until the thread's next read."""
        first = offset // PAGE_BYTES * PAGE_BYTES
        length = -(-(offset + nbytes - first) // PAGE_BYTES) * PAGE_BYTES
        buffer = _buffer(length)
        filled = self.read_into(buffer[:length], first)
        return buffer[offset - first : min(offset - first + nbytes, filled)]

    def read_into(self, target: memoryview, offset: int) -> int:
        """Fill whole blocks of memory with those of the file from `offset` on; returns how many bytes came, fewer at
        the file's end."""
        filled = 0
        while filled < len(target):
            count = os.preadv(self.descriptor, [target[filled:]], offset + filled)
            filled += count
            if count % PAGE_BYTES or count == 0:  # the end of the file
                break
        return filled


_THREAD = threading.local()


def _buffer(nbytes: int) -> memoryview:
    """This thread's buffer, at the beginning of a page; grown if it is too small.

    Its memory is private to this process: a forked child must not read into the same memory.
    """
    buffer = getattr(_THREAD, "buffer", None)
    if buffer is None or len(buffer) < nbytes:
        buffer = _THREAD.buffer = memoryview(new_area(nbytes))
    return buffer
