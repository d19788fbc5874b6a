"""The disk tier: every expert of a model, read in place from the checkpoint's safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import chain

from torch import Tensor

from transformers_moe_offload.disk_io.chunks import Chunk, Piece, Run, cut
from transformers_moe_offload.disk_io.file import FileRange
from transformers_moe_offload.disk_io.opened_file import OPEN_FILES
from transformers_moe_offload.disk_io.page_reads import most_spare_bytes
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.store.layer_source import ExpertSource, LayerSource, RecordedExpert
from transformers_moe_offload.store.ram_file import RamFile
from transformers_moe_offload.store.record import Fill, RecordLayout
from transformers_moe_offload.system.host_memory import host_bytes


class ExpertStore:
    """Reads any expert of a model into a record. Read-only and safe to use from several threads."""

    def __init__(self, layers: Sequence[LayerSource], *, past_cache: bool = False) -> None:
        """`past_cache` reads verbatim fields past the page cache, where that can be done."""
        self.past_cache = past_cache
        self.layers = {source.spec.layer: source for source in layers}
        self._layouts = {layer: _layouts(source) for layer, source in self.layers.items()}
        self._checked: set[ExpertId] = set()
        self._reads: dict[ExpertId, Sequence[Piece]] = {}

    def layout(self, layer: int, expert: int) -> RecordLayout:
        """The record layout of one expert; those of experts that are stored alike are the same."""
        return self._layouts[layer][expert]

    def stored_bytes(self, expert: ExpertId) -> int:
        """Bytes read from files for this expert."""
        return sum(piece.nbytes for piece in self._source(expert).pieces)

    @cached_property
    def can_be_mapped(self) -> bool:
        """Whether all files that hold experts can be open at once: a mapped file stays open."""
        experts = chain.from_iterable(source.experts for source in self.layers.values())
        return len({id(piece.file) for expert in experts for piece in expert.pieces}) <= OPEN_FILES.limit

    def is_as_used(self, layer: int) -> bool:
        """Whether most of a layer's experts are stored as they are used.

        A few may not be: the expert at the end of a file has one part in the next file.
        """
        experts = range(len(self.layers[layer].experts))
        return 2 * sum(self.file_ranges(ExpertId(layer, expert)) is not None for expert in experts) > len(experts)

    def spare_bytes(self, layer: int) -> int | None:
        """The most bytes of memory that whole pages of files add to the record of a layer's expert, as a rule; None if
        the layer's experts are in a `RamFile`, or are not stored as they are used."""
        if self.layers[layer].is_in_ram:
            return None
        found = (self.file_ranges(ExpertId(layer, expert)) for expert in range(len(self.layers[layer].experts)))
        return next((most_spare_bytes(ranges) for ranges in found if ranges is not None), None)

    def in_ram(self, expert: ExpertId) -> tuple[RamFile, int] | None:
        """The `RamFile` that an expert's record lies in, and its first byte there; None if it lies elsewhere."""
        source = self._source(expert)
        if isinstance(source, RecordedExpert) and isinstance(source.row.file, RamFile):
            return source.row.file, source.row.offset
        return None

    def file_ranges(self, expert: ExpertId) -> tuple[FileRange, ...] | None:
        """The file range of each field of an expert; None if a field is not stored as it is used."""
        return self._source(expert).file_ranges(self.layout(*expert))

    def read_into(self, expert: ExpertId, record: Tensor) -> int:
        """Fill a record, (nbytes,) uint8 in host memory, and return the bytes read.

        Raises `CheckpointError` and leaves the record half filled if a file is not what it was.
        """
        fill, record = self.fill(expert), record[: self.layout(*expert).nbytes]
        for chunk in fill.chunks:
            fill.read(chunk, chunk.inside(host_bytes(record)))
        return fill.finish(record)

    def fill(self, expert: ExpertId, chunk_bytes: int | None = None) -> Fill:
        """Begin to fill a record with an expert, in chunks of at most so many bytes, or in one."""
        return Fill(
            cut(self._pieces(expert), chunk_bytes),
            partial(Chunk.read_into, past_cache=self.past_cache),
            partial(self._finish, expert),
            is_checked=self.has_to_check(expert),
        )

    def _finish(self, expert: ExpertId, record: Tensor | None) -> int:
        if record is not None:
            self.check(expert, record)
        return self.stored_bytes(expert)

    def read_cached_into(self, expert: ExpertId, record: Tensor) -> bool:
        """Fill a record from the page cache, without waiting for the disk; returns whether all of it was there.

        False for experts that have yet to be checked, or are not stored as they are used.
        """
        runs, raw = self._verbatim(expert), host_bytes(record)
        if not runs or self.has_to_check(expert):
            return False
        return all(
            run.file.scatter_cached_into([raw[start:stop] for start, stop in run.segments], run.offset) for run in runs
        )

    def announce(self, expert: ExpertId) -> bool:
        """Have the system fetch an expert into the page cache, without waiting; returns whether it does."""
        runs = self._verbatim(expert)
        return bool(runs) and all(run.file.announce(run.offset, run.nbytes) for run in runs)

    def check(self, expert: ExpertId, record: Tensor) -> None:
        """Compare an expert's checksum, if there is one, the first time it is loaded: record (nbytes,) uint8."""
        if self.has_to_check(expert):
            self._source(expert).check(host_bytes(record))
            self._checked.add(expert)

    def has_to_check(self, expert: ExpertId) -> bool:
        """Whether an expert has a checksum that was not compared yet."""
        return expert not in self._checked and self._source(expert).has_checksum

    def _verbatim(self, expert: ExpertId) -> Sequence[Run]:
        """The reads of an expert that is read as it is stored and through the page cache; empty for other experts."""
        pieces = () if self.past_cache else self._pieces(expert)
        runs = [piece for piece in pieces if isinstance(piece, Run)]
        return runs if len(runs) == len(pieces) else ()

    def _pieces(self, expert: ExpertId) -> Sequence[Piece]:
        """The pieces that an expert is read from. Cached: for a small expert, planning takes longer than reading."""
        if expert not in self._reads:
            self._reads[expert] = self._source(expert).reads(self.layout(*expert))
        return self._reads[expert]

    def _source(self, expert: ExpertId) -> ExpertSource:
        return self.layers[expert.layer].experts[expert.expert]

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertStore:
        return self


def _layouts(source: LayerSource) -> tuple[RecordLayout, ...]:
    """The record layout of each expert; one object for each way in which experts of the layer are stored."""
    codecs = source.codecs
    of_kind = {id(kind): RecordLayout(source.spec.fields if kind is None else kind.stored) for kind in codecs.kinds}
    return tuple(of_kind[id(codecs.of(expert))] for expert in range(len(source.experts)))
