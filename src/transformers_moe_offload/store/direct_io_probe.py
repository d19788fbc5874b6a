"""Try out, on the files themselves, whether experts are read faster past the page cache.

Only useful if the page cache cannot hold them anyway (`system/free_memory.py`): otherwise experts that were read once
are cached. Takes some hundredths of a second, and reads some MiB that are not in the page cache yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import median

from transformers_moe_offload.disk_io.chunks import Run
from transformers_moe_offload.disk_io.file import FileRange
from transformers_moe_offload.disk_io.page_reads import placed
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.system.host_memory import PAGE_BYTES, PageMemory, host_bytes

READ_BYTES = 1 << 20
"""Bytes of each read: enough to measure the disk's speed, and not its latency."""

LEAST_BYTES = 64 << 10
"""Shorter pieces of experts tell about latency only."""

MOST_PAIRS = 8
"""One read each way is a pair; what counts is the median of them."""

MOST_SECONDS = 0.04
"""Seconds after which no further pair begins: a hard disk gets through two or three."""

MOST_LOOKED_AT = 64
"""Pieces that are checked to find some that are not in the page cache."""

CLEARLY = 1.1
"""Reading through the page cache is chosen if it is faster by this factor: it also takes processor time from the
arithmetic, and evicts pages of other programs."""


def is_faster_past_cache(store: ExpertStore) -> bool:
    """Whether to read past the page cache. False if system or filesystem refuse to; True if all pieces that could be
    tried are in the page cache now, because they will not stay there."""
    past: list[float] = []
    through: list[float] = []
    memory = PageMemory().take(READ_BYTES + 2 * PAGE_BYTES).fill_(1)  # no page faults during the timed reads
    buffer = host_bytes(memory)
    runs = (
        run for run in islice(_runs(store), MOST_LOOKED_AT) if run.file.mapped().is_all_on_disk(run.offset, run.end)
    )
    deadline = time.perf_counter() + MOST_SECONDS
    for first, second in zip(runs, runs, strict=False):
        past.append(_seconds(_pages_of, first, buffer))
        if first.file.directly() is None:
            return False
        through.append(_seconds(_bytes_of, second, buffer))
        if len(past) == MOST_PAIRS or time.perf_counter() > deadline:
            break
    return not past or median(past) < CLEARLY * median(through)


def _runs(store: ExpertStore) -> Iterator[Run]:
    """Pieces of experts: of the first expert of every layer, then of the second ones."""
    for number in range(max(len(source.experts) for source in store.layers.values())):
        for layer, source in store.layers.items():
            if number < len(source.experts):
                pieces = store.fill(ExpertId(layer, number), READ_BYTES).chunks[0].pieces
                yield from (piece for piece in pieces if isinstance(piece, Run) and piece.nbytes >= LEAST_BYTES)


def _seconds(read: Callable[[Run, memoryview], None], run: Run, buffer: memoryview) -> float:
    """Seconds for each byte."""
    run.file.read_into(buffer[:1], 0)  # opens the file; the next line opens it past the page cache
    run.file.directly()
    began = time.perf_counter()
    read(run, buffer)
    return (time.perf_counter() - began) / run.nbytes


def _pages_of(run: Run, buffer: memoryview) -> None:
    for read in placed([FileRange(run.file, run.offset, run.end)]).reads:
        run.file.read_pages_into(buffer[: read.nbytes], read.offset, read.needed)


def _bytes_of(run: Run, buffer: memoryview) -> None:
    run.file.read_into(buffer[: run.nbytes], run.offset)
