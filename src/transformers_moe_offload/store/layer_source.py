"""Where the experts of one sparse layer come from, and what they are made of.

One expert is its fields, wherever the checkpoint has them, or a record that was written to be read whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from zlib import crc32

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.chunks import Piece, Run, Segment, joined_runs
from transformers_moe_offload.disk_io.file import FileRange
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertSpec, FieldSpec
from transformers_moe_offload.formats.base import AS_USED, LayerCodecs
from transformers_moe_offload.store.field_source import FieldSource
from transformers_moe_offload.store.ram_file import RamFile
from transformers_moe_offload.store.record import ALIGNMENT, RecordLayout
from transformers_moe_offload.system.host_memory import host_bytes
from transformers_moe_offload.tensor_files.index import StoredTensor

Weights = dict[str, Tensor]
"""One expert's tensors by field name. Where they are views of a slot, they change when the slot is given to another
expert."""


@dataclass(frozen=True)
class ScatteredExpert:
    """An expert whose fields are where an ordinary checkpoint has them."""

    fields: tuple[FieldSource, ...]
    """In the order of the record's fields."""

    @property
    def pieces(self) -> tuple[StoredTensor, ...]:
        """The stored tensors of all fields."""
        return tuple(piece for field in self.fields for piece in field.pieces)

    def file_ranges(self, layout: RecordLayout) -> tuple[FileRange, ...] | None:
        """The file range of each field of a record, padding up to the next field included; None if a field is not
        stored as it is used."""
        found = [field.file_range for field in self.fields]
        return None if None in found else tuple(file_range for file_range in found if file_range is not None)

    def reads(self, layout: RecordLayout) -> list[Piece]:
        """The pieces that fill a record, in the order of the files: verbatim fields are read into their places, the
        others assembled there."""
        runs: list[Run] = []
        assembled: list[Piece] = []
        for spec, source in zip(layout.fields, self.fields, strict=True):
            start = layout.offsets[spec.name]
            if source.is_verbatim:
                runs += source.runs(start)
            else:
                assembled.append(source.assembled(start, spec))
        return [*joined_runs(runs), *assembled]

    @property
    def has_checksum(self) -> bool:
        """Ordinary checkpoints have none."""
        return False

    def check(self, record: memoryview) -> None:
        """There is nothing to compare with."""

    def then_cast(self, dtype: str) -> ScatteredExpert:
        """The same expert with every field cast once more."""
        return ScatteredExpert(tuple(field.then_cast(dtype) for field in self.fields))


@dataclass(frozen=True)
class RecordedExpert:
    """An expert stored as the record that it is used as, in one piece."""

    row: StoredTensor
    """uint8 (row bytes,): the record, and zeros up to the next expert's."""
    checksum: int | None = None
    """CRC-32 of the row; None where there is none."""

    @property
    def pieces(self) -> tuple[StoredTensor, ...]:
        """The row."""
        return (self.row,)

    def file_ranges(self, layout: RecordLayout) -> tuple[FileRange, ...] | None:
        """The fields inside of the row, padding included; None if records would not be aligned there."""
        if self.row.offset % ALIGNMENT:
            return None
        starts = [self.row.offset + layout.offsets[field.name] for field in layout.fields]
        ends = [*starts[1:], self.row.offset + layout.nbytes]
        return tuple(FileRange(self.row.file, start, end) for start, end in zip(starts, ends, strict=True))

    def reads(self, layout: RecordLayout) -> list[Piece]:
        """The record, in one go."""
        return [Run(self.row.file, self.row.offset, (Segment(0, layout.nbytes),))]

    @property
    def has_checksum(self) -> bool:
        """Whether one was written."""
        return self.checksum is not None

    def check(self, record: memoryview) -> None:
        """Raise `CheckpointError` if there is a checksum and a record does not match it."""
        if self.checksum is None:
            return
        found = crc32(bytes(self.row.nbytes - len(record)), crc32(record))
        if found != self.checksum:
            raise CheckpointError(
                f"{self.row.file.path} is damaged: bytes {self.row.offset:,} to "
                f"{self.row.offset + self.row.nbytes:,} have the checksum {found:#010x}, but {self.checksum:#010x} "
                f"was written; download or quantize it again"
            )

    def then_cast(self, dtype: str) -> RecordedExpert:
        """A record stays what it is; its codec says what it is decoded to."""
        return self


ExpertSource = ScatteredExpert | RecordedExpert
"""The stored bytes of one expert."""


@dataclass(frozen=True)
class LayerSource:
    """Where the experts of one sparse layer come from, and what they are made of."""

    spec: ExpertSpec
    """What the layer's module computes with."""
    experts: tuple[ExpertSource, ...]
    spare: Mapping[str, tuple[FieldSource, ...]] = field(default_factory=dict)
    """By field, the parts that the checkpoint stores behind the last expert and that no expert uses; needed only to
    write the checkpoint again."""
    codecs: LayerCodecs = AS_USED
    """How records stand for the fields of `spec`, expert by expert."""

    @property
    def is_in_ram(self) -> bool:
        """Whether experts are in a `RamFile`, not in the checkpoint's files."""
        return any(isinstance(piece.file, RamFile) for expert in self.experts for piece in expert.pieces)

    @property
    def is_recorded(self) -> bool:
        """Whether experts were written as records, to be used as they are."""
        return all(isinstance(expert, RecordedExpert) for expert in self.experts)

    def stored(self, expert: int) -> tuple[FieldSpec, ...]:
        """What an expert's record is made of."""
        codec = self.codecs.of(expert)
        return self.spec.fields if codec is None else codec.stored

    def cast(self, dtype: str) -> LayerSource:
        """The same layer with every field cast to another dtype; a coded one is decoded to it."""
        spec = replace(self.spec, fields=tuple(f.cast(dtype) for f in self.spec.fields))
        experts = tuple(
            one if self.codecs.of(expert) is not None else one.then_cast(dtype)
            for expert, one in enumerate(self.experts)
        )
        spare = {name: tuple(s.then_cast(dtype) for s in sources) for name, sources in self.spare.items()}
        return LayerSource(spec, experts, spare, self.codecs.cast(dtype))

    def read(self, expert: int) -> Weights:
        """One expert's fields as the experts module has them, in memory of their own."""
        record = self.read_record(expert)
        weights, codec = RecordLayout(self.stored(expert)).views(record), self.codecs.of(expert)
        return weights if codec is None else codec.decode(weights)

    def read_record(self, expert: int) -> Tensor:
        """One expert as it is stored, uint8 (nbytes,), its checksum compared."""
        layout = RecordLayout(self.stored(expert))
        record = torch.zeros(layout.nbytes, dtype=torch.uint8)
        raw = host_bytes(record)
        for piece in self.experts[expert].reads(layout):
            piece.read_into([raw[start:stop] for start, stop in piece.segments])
        self.experts[expert].check(raw)
        return record

    def __deepcopy__(self, memo: dict[int, object]) -> LayerSource:
        return self
