"""One expert as one contiguous record: where each of its tensors sits, and the reads that fill it in host memory.

The reads are chunks, in any order and in parallel. An expert is whole when all its chunks have been read and `finish`
has returned; never before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.chunks import Chunk, Segment, Solid
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import ExpertId, FieldSpec
from transformers_moe_offload.system.host_memory import PAGE_BYTES

ALIGNMENT = 64
"""Bytes. A cache line, and what torch's CPU allocator gives every tensor: kernels that choose a path by alignment
then choose the same one for a tensor in a record as for a tensor of its own."""


class RecordLayout:
    """Offsets of an expert's tensors in its record. Two layouts with equal fields are equal."""

    def __init__(self, fields: Sequence[FieldSpec]) -> None:
        self.fields = tuple(fields)
        self.offsets: dict[str, int] = {}
        end = 0
        for field in self.fields:
            self.offsets[field.name] = end
            end += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = max(end, ALIGNMENT)
        """Bytes of the record, padding included."""
        self.row_bytes = -(-self.nbytes // PAGE_BYTES) * PAGE_BYTES
        """Bytes from one record to the next, where records are stored one after another: whole pages."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordLayout) and self.fields == other.fields

    def __hash__(self) -> int:
        return hash(self.fields)

    def views(self, record: Tensor, offsets: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The tensors inside a record, without copying: record (nbytes,) uint8 -> each field's shape and dtype.

        `offsets`, by field, where they are not those of a record.
        """
        seen = {}
        for field, start in zip(self.fields, self.offsets.values() if offsets is None else offsets, strict=True):
            raw = record[start : start + field.nbytes]
            seen[field.name] = raw.view(torch_dtype(field.dtype)).view(field.shape)
        return seen


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
        from_files = 0

        def read_all(record: memoryview) -> None:
            nonlocal from_files
            from_files = read(expert, torch.frombuffer(record, dtype=torch.uint8))

        chunk = Chunk((Solid(Segment(0, nbytes), read_all, is_verbatim=True),))
        return Fill((chunk,), Chunk.read_into, lambda record: from_files)

    return fill
