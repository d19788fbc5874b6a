"""Plan zero-copy reads of an expert in whole pages of its files, and where its fields are in memory then. Pure.

Direct I/O writes into memory without a copy if a read begins and ends at page boundaries, in the file and in memory. So
an expert's file ranges begin as far behind a page boundary in memory as in the file, and are used where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers_moe_offload.disk_io.file import File, FileRange, joined
from transformers_moe_offload.system.host_memory import PAGE_BYTES


class PageRead(NamedTuple):
    """Whole pages of a file, and where they go."""

    file: File
    offset: int
    nbytes: int
    needed: int
    """The bytes up to the end of the wanted ones, which have to be there: the last page of a file may be partial."""
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
        """Bytes of memory that it takes."""
        return sum(read.nbytes for read in self.reads)


def placed(ranges: Sequence[FileRange]) -> Placed:
    """Place an expert, given the file range of each of its fields."""
    reads: list[PageRead] = []
    begins: list[tuple[FileRange, int]] = []
    room = 0
    for file_range in joined(ranges):
        first = file_range.start // PAGE_BYTES * PAGE_BYTES
        needed = file_range.stop - first
        nbytes = -(-needed // PAGE_BYTES) * PAGE_BYTES
        reads.append(PageRead(file_range.file, first, nbytes, needed, room))
        begins.append((file_range, room - first))
        room += nbytes

    def place_of(field: FileRange) -> int:
        return next(
            field.start + shift
            for whole, shift in begins
            if whole.file is field.file and whole.start <= field.start and field.stop <= whole.stop
        )

    return Placed(tuple(reads), tuple(map(place_of, ranges)))


def most_spare_bytes(ranges: Sequence[FileRange]) -> int:
    """The most bytes of memory that whole pages add to an expert with these ranges, wherever in a page they begin."""
    return sum(PAGE_BYTES * (1 if one.nbytes % PAGE_BYTES == 0 else 2) for one in joined(ranges))


def parts(read: PageRead, most_bytes: int) -> list[PageRead]:
    """The same pages in reads of at most so many bytes, or of a page."""
    step = max(PAGE_BYTES, most_bytes // PAGE_BYTES * PAGE_BYTES)
    return [
        PageRead(read.file, read.offset + done, nbytes, min(nbytes, read.needed - done), read.start + done)
        for done in range(0, read.nbytes, step)
        for nbytes in [min(step, read.nbytes - done)]
    ]
