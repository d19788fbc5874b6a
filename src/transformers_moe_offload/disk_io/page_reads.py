"""Where an expert lies in memory that whole pages of its files are read into, as they are. Pure.

Disks write into memory themselves if a read begins and ends where a page does, in the file and in memory. So an
expert's stretches begin as far behind a page as they do in the file, and are used where they are: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.disk_io.file_range import FileRange, joined
from transformers_moe_offload.system.host_memory import PAGE_BYTES


class PageRead(NamedTuple):
    """Whole pages of a file, and where they go."""

    file: File
    offset: int
    nbytes: int
    needed: int
    """Of these bytes, those up to the end of what is wanted: the last page of a file is not whole."""
    start: int
    """Where in the memory they go, in bytes; a multiple of a page, like `offset` and `nbytes`."""


@dataclass(frozen=True)
class Placed:
    """An expert in the pages of its files."""

    reads: tuple[PageRead, ...]
    offsets: tuple[int, ...]
    """Where each field begins in memory, bytes."""

    @cached_property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(read.nbytes for read in self.reads)


def placed(stretches: Sequence[FileRange]) -> Placed:
    """Place an expert whose fields lie in these stretches, one for each field."""
    reads: list[PageRead] = []
    begins: list[tuple[FileRange, int]] = []
    room = 0
    for stretch in joined(stretches):
        first = stretch.start // PAGE_BYTES * PAGE_BYTES
        needed = stretch.stop - first
        nbytes = -(-needed // PAGE_BYTES) * PAGE_BYTES
        reads.append(PageRead(stretch.file, first, nbytes, needed, room))
        begins.append((stretch, room - first))
        room += nbytes
    shifts = [_shift_of(field, begins) for field in stretches]
    return Placed(tuple(reads), tuple(field.start + shift for field, shift in zip(stretches, shifts, strict=True)))


def most_spare_bytes(stretches: Sequence[FileRange]) -> int:
    """How much more memory than its own bytes an expert takes that lies like this, wherever in a page it begins."""
    return sum(PAGE_BYTES * (1 if (one.stop - one.start) % PAGE_BYTES == 0 else 2) for one in joined(stretches))


def parts(read: PageRead, most_bytes: int) -> list[PageRead]:
    """The same pages in reads of at most so many bytes, or of a page."""
    step = max(PAGE_BYTES, most_bytes // PAGE_BYTES * PAGE_BYTES)
    return [
        PageRead(read.file, read.offset + done, nbytes, min(nbytes, read.needed - done), read.start + done)
        for done in range(0, read.nbytes, step)
        for nbytes in [min(step, read.nbytes - done)]
    ]


def _shift_of(field: FileRange, begins: Iterable[tuple[FileRange, int]]) -> int:
    """From a field's place in its file to the one in memory."""
    return next(
        shift
        for whole, shift in begins
        if whole.file is field.file and whole.start <= field.start and field.stop <= whole.stop
    )
