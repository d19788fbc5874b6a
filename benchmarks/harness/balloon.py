"""Hold so many bytes of RAM until stdin is closed, locked so that nothing can make this process give them up.

    python benchmarks/harness/balloon.py BYTES    # prints "held" once they are

A script of its own that imports next to nothing: it should hold what was asked for and no more.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys


def hold(nbytes: int) -> None:
    """Allocate, lock, say so, wait."""
    held = mmap.mmap(-1, nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(held))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    print("held", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    hold(int(sys.argv[1]))
