"""One expert's record in flight into host memory: chunks that can be read in any order and in parallel.

An expert is whole when all its chunks have been read and `finish` has returned; never before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.chunks import Chunk, Segment
from transformers_moe_offload.expert import ExpertId

ReadInto = Callable[[ExpertId, Tensor], int]
"""Fills a record in host memory with an expert and returns the bytes read from files, e.g. `ExpertStore.read_into`."""


class Fill(Protocol):
    """The reads that fill a record with one expert."""

    @property
    def chunks(self) -> Sequence[Chunk]:
        """The chunks that fill the whole record."""

    @property
    def is_checked(self) -> bool:
        """Whether `finish` has to see the whole record, to compare its checksum."""

    def read(self, chunk: Chunk, targets: Sequence[memoryview]) -> None:
        """Read one of the chunks into memory for each of its segments. From any thread, several at once."""

    def finish(self, record: Tensor | None) -> int:
        """All chunks have been read: returns the bytes that came from files, or raises what is wrong with them.

        record (nbytes,) uint8 is what they were read into, where that is one record.
        """

    def give_up(self) -> None:
        """Not all chunks will be read; none is being read any more."""


OpenFill = Callable[[ExpertId, int | None], Fill]
"""Begins to fill a record with an expert, in chunks of at most so many bytes, or in one."""


def whole(read: ReadInto, nbytes: int) -> OpenFill:
    """Fill records of `nbytes` by a function that fills them in one go."""
    return lambda expert, chunk_bytes: _Whole(read, expert, nbytes)


class _Whole:
    """An expert that a function reads in one go: a fill, and the only piece of its only chunk."""

    is_checked = False
    is_verbatim = True

    def __init__(self, read: ReadInto, expert: ExpertId, nbytes: int) -> None:
        self.segments = (Segment(0, nbytes),)
        self.chunks = (Chunk((self,)),)
        self._read = read
        self._expert = expert
        self._from_files = 0

    def read_into(self, targets: Sequence[memoryview], *, past_cache: bool = False) -> None:
        self._from_files = self._read(self._expert, torch.frombuffer(targets[0], dtype=torch.uint8))

    def split(self, nbytes: int, *, anywhere: bool) -> None:
        return None

    def read(self, chunk: Chunk, targets: Sequence[memoryview]) -> None:
        self.read_into(targets)

    def finish(self, record: Tensor | None) -> int:
        return self._from_files

    def give_up(self) -> None:
        pass
