"""One expert as one contiguous record: where each of its tensors sits, and how to see them in a buffer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from transformers_moe_offload.expert import FieldSpec

ALIGNMENT = 64
"""Bytes. A cache line, and what torch's CPU allocator gives every tensor: kernels that choose a path by alignment
then choose the same one for a tensor in a record as for a tensor of its own."""

PAGE_BYTES = 4096
"""Bytes that reads past the page cache have to begin at a multiple of, on every disk that we know, and that memory is
mapped in."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype torch calls by this name, e.g. `bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def host_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the CPU, for reading into."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy as many bytes as both have, with the interpreter's lock released, which assigning to a slice does not do."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


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
