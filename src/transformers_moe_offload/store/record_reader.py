"""One expert's record in flight into host memory: chunks that can be read in any order and in parallel.

An expert is whole when all its chunks have been read and `finish` has returned; never before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.chunks import Chunk, Segment
from transformers_moe_offload.expert import ExpertId

ReadInto = Callable[[ExpertId, Tensor], int]
"""Fills a record in host memory with an expert and returns the bytes read from files, e.g. `ExpertStore.read_into`."""


@dataclass(frozen=True)
class Fill:
    """The reads that fill a record with one expert."""

    chunks: Sequence[Chunk]
    """The chunks that fill the whole record."""
    read: Callable[[Chunk, Sequence[memoryview]], None]
    """Read one of the chunks into memory for each of its segments. From any thread, several at once."""
    finish: Callable[[Tensor | None], int]
    """All chunks have been read: returns the bytes that came from files, or raises what is wrong with them.

    It takes what they were read into, uint8 (nbytes,), where that is one record.
    """
    give_up: Callable[[], None] = lambda: None
    """Not all chunks will be read; none is being read any more."""
    is_checked: bool = False
    """Whether `finish` has to see the whole record, to compare its checksum."""


OpenFill = Callable[[ExpertId, int | None], Fill]
"""Begins to fill a record with an expert, in chunks of at most so many bytes, or in one."""


def whole(read: ReadInto, nbytes: int) -> OpenFill:
    """Fill records of `nbytes` by a function that fills them in one go."""

    def fill(expert: ExpertId, chunk_bytes: int | None) -> Fill:
        piece = _Whole(partial(read, expert), nbytes)
        return Fill((Chunk((piece,)),), Chunk.read_into, lambda record: piece.from_files)

    return fill


class _Whole:
    """A piece that is all of a record, which a function reads."""

    is_verbatim = True

    def __init__(self, read: Callable[[Tensor], int], nbytes: int) -> None:
        self.segments = (Segment(0, nbytes),)
        self.from_files = 0
        self._read = read

    def read_into(self, targets: Sequence[memoryview], *, past_cache: bool = False) -> None:
        self.from_files = self._read(torch.frombuffer(targets[0], dtype=torch.uint8))

    def split(self, nbytes: int, *, anywhere: bool) -> None:
        return None
