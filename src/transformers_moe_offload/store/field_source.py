"""Where one field of one expert is in the checkpoint's own files, and how it becomes what the model expects.

If the bytes of a field are stored as they are used, they go straight into the record. Otherwise (another dtype, a
transposed or interleaved layout) the pieces are read into scratch memory and assembled from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.chunks import Run, Segment, Solid, joined_runs
from transformers_moe_offload.disk_io.file import FileRange
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import ITEMSIZE, FieldSpec
from transformers_moe_offload.system.host_memory import host_bytes
from transformers_moe_offload.tensor_files.index import StoredTensor
from transformers_moe_offload.tensor_files.reading import read_stored

Assemble = Callable[[list[Tensor]], Tensor]
"""Turns the pieces of one expert's field, in their stored order, into the field (up to leading dimensions of 1)."""


@dataclass(frozen=True)
class FieldSource:
    """Where one field of one expert comes from."""

    pieces: tuple[StoredTensor, ...]
    casts: tuple[str, ...]
    """Dtypes the pieces are cast to, one after another, before they are assembled; the last one is the field's."""
    assemble: Assemble | None = None
    """None where the pieces, one after another, are the field."""

    @cached_property
    def is_verbatim(self) -> bool:
        """Whether the stored bytes can go into a record as they are."""
        return self.assemble is None and all({piece.dtype} == set(self.casts) for piece in self.pieces)

    @cached_property
    def file_range(self) -> FileRange | None:
        """The file range of a field that is verbatim, in one piece, and aligned to its elements; else None."""
        if not self.is_verbatim or self.pieces[0].offset % ITEMSIZE[self.pieces[0].dtype]:
            return None
        first = self.pieces[0]
        end = first.offset
        for piece in self.pieces:
            if piece.file is not first.file or piece.offset != end:
                return None
            end += piece.nbytes
        return FileRange(first.file, first.offset, end)

    def then_cast(self, dtype: str) -> FieldSource:
        """The same field, cast once more."""
        return replace(self, casts=(*self.casts, dtype)) if self.casts[-1] != dtype else self

    def read(self, shape: tuple[int, ...]) -> Tensor:
        """The field in memory of its own."""
        raw = torch.empty(prod(shape) * ITEMSIZE[self.casts[-1]], dtype=torch.uint8)
        view = raw.view(torch_dtype(self.casts[-1])).view(shape)
        if self.is_verbatim:
            for run in joined_runs(self.runs(0)):
                run.read_into([host_bytes(raw)[start:stop] for start, stop in run.segments])
        else:
            self.assemble_into(view)
        return view

    def runs(self, start: int) -> list[Run]:
        """For a verbatim field that begins at `start` in its record, which stored bytes go where."""
        runs = []
        for piece in self.pieces:
            runs.append(Run(piece.file, piece.offset, (Segment(start, start + piece.nbytes),)))
            start += piece.nbytes
        return runs

    def assembled(self, start: int, spec: FieldSpec) -> Solid:
        """A field that is not verbatim and begins at `start` in its record, read through the page cache."""
        return Solid(Segment(start, start + spec.nbytes), partial(self._fill, spec))

    def _fill(self, spec: FieldSpec, memory: memoryview) -> None:
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        self.assemble_into(raw.view(torch_dtype(spec.dtype)).view(spec.shape))

    def assemble_into(self, view: Tensor) -> None:
        """Read the pieces of a field that is not verbatim, cast and assemble them."""
        tensors = [self._cast(read_stored(piece)) for piece in self.pieces]
        if self.assemble is not None:
            view.copy_(self.assemble(tensors).reshape(view.shape))
        else:
            torch.cat([tensor.reshape(-1) for tensor in tensors], out=view.view(-1))

    def _cast(self, tensor: Tensor) -> Tensor:
        for dtype in self.casts:
            tensor = tensor.to(torch_dtype(dtype))
        return tensor
