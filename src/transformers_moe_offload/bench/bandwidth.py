"""How fast bytes can get to the arithmetic: from the disk, from the page cache, through RAM, over the link to a GPU.

These figures serve as limits, so the best of several passes counts, and no unnecessary work is timed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformers_moe_offload.bench.page_cache import can_drop, drop, resident_share
from transformers_moe_offload.disk_io.file import FileRange, joined
from transformers_moe_offload.disk_io.page_reads import placed
from transformers_moe_offload.kernels import cpu, native
from transformers_moe_offload.slots.direct_io import PageReader
from transformers_moe_offload.slots.transfer import Transfer
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.system.host_memory import PageMemory, host_bytes

SAMPLE_BYTES = 2 << 30
"""Most that one pass reads: some seconds of a slow drive, and more than any drive's own buffer."""

RAM_BYTES = 256 << 20
"""Size of each buffer that RAM is measured with: larger than the caches of any processor we know of."""

_AT_ONCE = 8
"""Reads past the page cache that are in flight at once."""


def expert_ranges(store: ExpertStore) -> list[FileRange]:
    """The ranges to read for each expert in turn; tensors that lie next to each other in a file are one range."""
    experts = [expert for source in store.layers.values() for expert in source.experts]
    stored = ([FileRange(p.file, p.offset, p.offset + p.nbytes) for p in expert.pieces] for expert in experts)
    return [found for ranges in stored for found in joined(ranges)]


def sample(ranges: Sequence[FileRange], most_bytes: int = SAMPLE_BYTES) -> list[FileRange]:
    """As many of the ranges as come to `most_bytes`, evenly spread."""
    total = sum(found.nbytes for found in ranges)
    step = max(1, -(-total // most_bytes))
    return list(ranges[::step])


def disk_bandwidth(ranges: Sequence[FileRange], threads: int, repeats: int) -> dict[str, float | None]:
    """Bytes per second, cold and warm, and how much of the files was cached before the cold passes.

    Cold is through the page cache or past it, whichever is faster; None where the page cache cannot be emptied.
    """
    chosen = sample(ranges)
    files = sorted({found.file.path for found in chosen})
    cold, cached = [], []
    for _ in range(repeats if can_drop() else 0):
        drop(files)
        cached.append(resident_share(files))
        cold.append(read_all(chosen, threads))
        drop(files)
        cold.append(read_all_past_cache(chosen, threads))
    hot = [read_all(chosen, threads) for _ in range(repeats + 1)]  # the first pass may still have to fetch
    return {
        "cold_bytes_per_s": max(cold, default=None),
        "warm_bytes_per_s": max(hot[1:]),
        "cached_share_before_cold": max(cached, default=None),
        "threads": threads,
        "range_bytes": max(found.nbytes for found in chosen),
    }


def read_all(ranges: Sequence[FileRange], threads: int) -> float:
    """Bytes per second over all ranges, read through the page cache by some threads into existing buffers."""
    largest = max(found.nbytes for found in ranges)
    buffers = [torch.ones(largest, dtype=torch.uint8) for _ in range(threads)]  # ones: every page is touched

    def read(worker: int) -> None:
        target = host_bytes(buffers[worker])
        for found in ranges[worker::threads]:
            found.file.read_into(target[: found.nbytes], found.start)

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(read, range(threads)))
        elapsed_s = time.perf_counter() - started
    return sum(found.nbytes for found in ranges) / elapsed_s


def read_all_past_cache(ranges: Sequence[FileRange], threads: int) -> float:
    """The same past the page cache, with the reader that fills slots."""
    reader, memory = PageReader(threads), PageMemory()
    wanted = [placed([found]) for found in ranges]
    largest = max(place.nbytes for place in wanted)
    spare = deque(memory.take(largest).fill_(1) for _ in range(_AT_ONCE))
    coming: deque[tuple[Transfer, Tensor]] = deque()
    started = time.perf_counter()
    for place in wanted:
        if not spare:
            transfer, buffer = coming.popleft()
            transfer.finish()
            spare.append(buffer)
        coming.append((reader.start(place.reads, spare[0], int), spare.popleft()))
    for transfer, _ in coming:
        transfer.finish()
    return sum(found.nbytes for found in ranges) / (time.perf_counter() - started)


def ram_bandwidth(repeats: int) -> dict[str, Any]:
    """Bytes per second of a copy (each byte counted once), and of `read_bandwidth`, on torch's number of threads."""
    source = torch.ones(RAM_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source) + 1
    read = read_bandwidth(RAM_BYTES, repeats)
    return {
        "copy_bytes_per_s": RAM_BYTES / best_s(lambda: target.copy_(source), repeats),
        "read_bytes_per_s": read.bytes_per_s,
        "fastest_read": read.way,
    }


class ReadSpeed(NamedTuple):
    """How fast memory was read, and in which way."""

    bytes_per_s: float
    way: str


def read_bandwidth(nbytes: int, repeats: int, clock: Callable[[], float] = time.perf_counter) -> ReadSpeed:
    """The fastest of several ways to read memory of `nbytes`, on torch's number of threads.

    By a loop in C that reads and does nothing else, as one row or as several rows side by side, which is how kernels
    read a matrix, from ordinary and from huge pages; and by torch's products of a float32 matrix and a vector, which
    are all that is tried where the compiled kernels are missing. No product of weights of this size gets at them
    faster. `clock` returns seconds.
    """
    threads, columns = torch.get_num_threads(), 4096
    ordinary, huge = torch.ones(nbytes, dtype=torch.uint8), PageMemory().take(nbytes).fill_(1)
    matrix = ordinary[: nbytes // (4 * columns) * 4 * columns].view(torch.float32).view(-1, columns)
    vector = torch.ones(columns)
    ways = [ReadSpeed(matrix.nbytes / best_s(lambda: torch.mv(matrix, vector), repeats, clock), "a matvec in torch")]
    if native.library() is not None:
        for pages, memory in (("ordinary", ordinary), ("huge", huge)):
            for streams in cpu.STREAMS:
                seconds = best_s(partial(cpu.read_memory, memory, streams, threads), repeats, clock)
                ways.append(ReadSpeed(nbytes / seconds, f"{streams} at a time from {pages} pages"))
    return max(ways)


def link_bandwidth(device: torch.device, record_bytes: int, repeats: int) -> dict[str, float]:
    """Bytes per second from pinned and from ordinary memory to a GPU, one expert's record after another."""
    copies = max(1, RAM_BYTES // record_bytes)
    target = torch.empty(record_bytes, dtype=torch.uint8, device=device)

    def speed(source: torch.Tensor) -> float:
        def carry() -> None:
            for _ in range(copies):
                target.copy_(source, non_blocking=True)  # copy: host -> device, async
            torch.cuda.synchronize(device)

        return copies * record_bytes / best_s(carry, repeats)

    ordinary = torch.ones(record_bytes, dtype=torch.uint8)
    return {
        "pinned_bytes_per_s": speed(ordinary.pin_memory()),
        "pageable_bytes_per_s": speed(ordinary),
        "record_bytes": record_bytes,
    }


def best_s(work: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        started = clock()
        work()
        seconds.append(clock() - started)
    return min(seconds)
