"""One expert as one contiguous record: where each of its tensors sits, and how to see them in a buffer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import FieldSpec
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
