"""Give freed memory back to the system: glibc keeps pieces below 32 MiB, and a pass through many layers leaves some
65 MB of them a layer (a 2048-wide Llama in float32, glibc 2.36, 2026-11)."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Release freed memory where the allocator has `malloc_trim`; elsewhere do nothing."""
    if sys.platform != "linux":
        return
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
