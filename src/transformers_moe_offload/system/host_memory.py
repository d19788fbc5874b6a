"""Memory of the host: seen as bytes, and page-aligned, in huge pages where the system has them.

A disk that writes into memory by direct I/O is given every physically contiguous piece of it. A read of 3 MiB past the
page cache took 2.0 ms into ordinary pages, which lie apart from each other, and 0.15 ms of a core; into huge pages 0.8
to 1.2 ms, and 0.02 ms of a core (Linux 6.18, ext4 on a virtual disk). Few slots are a multiple of a huge page, so they
are cut from large areas.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import torch
from torch import Tensor

PAGE_BYTES = 4096
"""Size of a page: memory is mapped in multiples of it, and reads past the page cache have to begin at one on every disk
that we know."""

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Memory of this process alone, not to be shared: Linux has huge pages for that. Windows knows no other kind."""

AREA_BYTES = 64 << 20
"""Address space asked for at once. Memory is taken only where it is written to, a huge page at a time."""


def host_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the CPU, for reading into."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy as many bytes as both have, with the interpreter's lock released, which assigning to a slice does not do."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


class PageMemory:
    """Hands out memory on the CPU, and takes it back."""

    def __init__(self) -> None:
        self._rest = 0, torch.empty(0, dtype=torch.uint8)
        """The address of the latest area, and the part of it that was never handed out."""
        self._areas: dict[int, mmap.mmap] = {}
        """Areas by the address at which they begin."""
        self._owners: dict[int, int] = {}
        """By the address of memory that was handed out, the address of its area."""
        self._spare: dict[int, list[Tensor]] = {}
        """Memory that was given back, by its size."""

    @torch.inference_mode(False)  # the memory outlives an inference-mode block that may be open
    def take(self, nbytes: int) -> Tensor:
        """Memory that begins at a page, uint8 (nbytes,)."""
        room = _whole_pages(nbytes)
        if self._spare.get(room):
            return self._spare[room].pop()[:nbytes]
        area, memory = self._rest
        if memory.nbytes < room:
            area, memory = self._new_area(max(AREA_BYTES, room))
        self._owners[memory.data_ptr()] = area
        self._rest = area, memory[room:]
        return memory[:nbytes]

    @torch.inference_mode(False)
    def give_back(self, memory: Tensor) -> None:
        """Return memory that is not read or written any more: its pages to the system, its addresses to later calls."""
        room, address = _whole_pages(memory.nbytes), memory.data_ptr()
        if hasattr(mmap, "MADV_DONTNEED"):
            begins = self._owners[address]
            self._areas[begins].madvise(mmap.MADV_DONTNEED, address - begins, room)
        self._spare.setdefault(room, []).append(memory.as_strided((room,), (1,)))

    def _new_area(self, nbytes: int) -> tuple[int, Tensor]:
        area = new_area(nbytes)
        memory = torch.frombuffer(area, dtype=torch.uint8)
        self._areas[memory.data_ptr()] = area
        return memory.data_ptr(), memory


def new_area(nbytes: int) -> mmap.mmap:
    """Zeros, in huge pages where the system has them; pages take memory only once they are written to."""
    area = mmap.mmap(-1, nbytes, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that was built without them
            area.madvise(mmap.MADV_HUGEPAGE)
    return area


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
