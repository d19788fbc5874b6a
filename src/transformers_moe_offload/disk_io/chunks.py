"""Cut the reads of one expert into chunks, which can be done in any order and in parallel.

Pure, but for the reads that a piece stands for. `store/record.py` asks for chunks, and the threads of
`reader_pool.py` read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.system.host_memory import PAGE_BYTES


class Segment(NamedTuple):
    """Bytes of a record, from `start` up to `stop`."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start

    def parts(self, most_bytes: int) -> list[Segment]:
        """The same bytes in parts of at most so many."""
        starts = range(self.start, self.stop, most_bytes)
        return [Segment(start, min(start + most_bytes, self.stop)) for start in starts]


@dataclass(frozen=True)
class Run:
    """Stored bytes that lie in one piece in a file, and the places in a record that they go to."""

    file: File
    offset: int
    segments: tuple[Segment, ...]

    is_verbatim = True

    @property
    def end(self) -> int:
        """The first byte in the file that does not belong to it."""
        return self.offset + self.nbytes

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return _nbytes(self.segments)

    def read_into(self, targets: Sequence[memoryview], *, past_cache: bool = False) -> None:
        """One read, scattered over the targets."""
        self.file.scatter_into(targets, self.offset, past_cache=past_cache)

    def split(self, nbytes: int, *, anywhere: bool) -> tuple[Run, Run] | None:
        """Two pieces with the same bytes, the first of at most `nbytes`; None if it must not be cut there.

        The cut is at a page boundary of the file, as reads past the page cache would read a page with a cut inside
        twice; `anywhere` allows others.
        """
        end = (self.offset + nbytes) // PAGE_BYTES * PAGE_BYTES
        if end > self.offset:
            nbytes = end - self.offset
        elif not anywhere:
            return None
        before: list[Segment] = []
        after: list[Segment] = []
        for segment in self.segments:
            middle = segment.start + min(max(0, nbytes), segment.nbytes)
            nbytes -= segment.nbytes
            before += [Segment(segment.start, middle)] if middle > segment.start else []
            after += [Segment(middle, segment.stop)] if middle < segment.stop else []
        rest = Run(self.file, self.offset + _nbytes(before), tuple(after))
        return Run(self.file, self.offset, tuple(before)), rest


@dataclass(frozen=True)
class Solid:
    """A part of a record that a function fills."""

    segment: Segment
    fill: Callable[[memoryview], None]
    is_verbatim: bool = False

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The one part."""
        return (self.segment,)

    def read_into(self, targets: Sequence[memoryview], *, past_cache: bool = False) -> None:
        """Fill the target."""
        self.fill(targets[0])

    def split(self, nbytes: int, *, anywhere: bool) -> None:
        """None: it is filled as a whole."""


Piece = Run | Solid
"""Something that is read in one go. `segments` are the parts of the record that it fills, in the order of its bytes;
`is_verbatim`, that its bytes are those of a file, so that they can be read to any address."""


def joined_runs(runs: Iterable[Run]) -> list[Run]:
    """The same bytes, with neighbours in a file made one: a checkpoint has an expert's matrices side by side, and one
    read of them is 1.15 times as fast as three from a cold disk."""
    found: list[Run] = []
    for run in sorted(runs, key=lambda run: (id(run.file), run.offset)):
        if found and found[-1].file is run.file and found[-1].end == run.offset:
            found[-1] = Run(run.file, found[-1].offset, found[-1].segments + run.segments)
        else:
            found.append(run)
    return found


@dataclass(frozen=True)
class Chunk:
    """A part of an expert that one thread reads."""

    pieces: tuple[Piece, ...]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The parts of the record that it fills, in the order of its bytes."""
        return tuple(segment for piece in self.pieces for segment in piece.segments)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the record that it fills."""
        return _nbytes(self.segments)

    @property
    def is_verbatim(self) -> bool:
        """Whether it can be read to any address."""
        return all(piece.is_verbatim for piece in self.pieces)

    def inside(self, record: memoryview) -> list[memoryview]:
        """The memory of its segments in a record."""
        return [record[start:stop] for start, stop in self.segments]

    def one_by_one(self, buffer: memoryview) -> list[memoryview]:
        """Memory for its segments, one after the other, in a buffer of `nbytes`."""
        found, start = [], 0
        for segment in self.segments:
            found.append(buffer[start : start + segment.nbytes])
            start += segment.nbytes
        return found

    def read_into(self, targets: Sequence[memoryview], *, past_cache: bool = False) -> None:
        """Read all pieces into memory for each of the segments."""
        first = 0
        for piece in self.pieces:
            past = first + len(piece.segments)
            piece.read_into(targets[first:past], past_cache=past_cache)
            first = past


def cut(pieces: Sequence[Piece], chunk_bytes: int | None = None) -> list[Chunk]:
    """Chunks of about equal size, of at most `chunk_bytes` as far as pieces can be taken apart; None: one chunk.

    Every byte is in one of them, and their bytes come in the order of the pieces.
    """
    share = _even_share(sum(_nbytes(piece.segments) for piece in pieces), chunk_bytes)
    chunks: list[Chunk] = []
    gathered: list[Piece] = []
    room = share
    waiting = list(reversed(pieces))
    while waiting:
        piece = waiting.pop()
        nbytes = _nbytes(piece.segments)
        halves = piece.split(room, anywhere=not gathered) if nbytes > room > 0 else None
        if halves is not None:
            waiting += reversed(halves)
        elif nbytes > room and gathered:
            chunks.append(Chunk(tuple(gathered)))
            gathered, room = [], share
            waiting.append(piece)
        else:
            gathered.append(piece)
            room = max(0, room - nbytes)
    return [*chunks, Chunk(tuple(gathered))]


def _even_share(nbytes: int, chunk_bytes: int | None) -> int:
    """Bytes for each chunk. A page more than an even share where there is room for it: cuts move to page boundaries,
    which must not leave a small rest at the end."""
    if chunk_bytes is None or nbytes <= chunk_bytes:
        return nbytes
    number = -(-nbytes // chunk_bytes)
    if -(-nbytes // number) + PAGE_BYTES > chunk_bytes:
        number += 1
    return min(chunk_bytes, -(-nbytes // number) + PAGE_BYTES)


def _nbytes(segments: Sequence[Segment]) -> int:
    return sum(stop - start for start, stop in segments)
