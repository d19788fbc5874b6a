"""Measure how fast experts can be read from their files: cold from the disk, warm from the page cache.

    python benchmarks/bandwidth.py '{"folder": "...", "repeats": 3}' answer.json

Reads one expert's range after another with as many threads as the package reads with, into buffers that exist, and
computes nothing. The best of several passes counts: it is to be a limit, so it should not be beaten.
"""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from job import serve
from page_cache import drop, resident_share, warm

from transformers_moe_offload.memory.safetensors_index import read_header
from transformers_moe_offload.memory.transfer import default_workers


class Range(NamedTuple):
    """One expert's bytes in a file."""

    path: Path
    start: int
    nbytes: int


def measure_bandwidth(folder: str, repeats: int) -> dict[str, float]:
    """Bytes per second, cold and warm, and how much of the files was cached before the cold passes."""
    files = sorted(Path(folder).glob("*.safetensors"))
    ranges = [found for file in files for found in _expert_ranges(file)]
    cold, cached = [], []
    for _ in range(repeats):
        drop(files)
        cached.append(resident_share(files))
        cold.append(_read_all(ranges))
    warm(files)
    hot = [_read_all(ranges) for _ in range(repeats)]
    return {
        "cold_bytes_per_s": max(cold),
        "warm_bytes_per_s": max(hot),
        "cached_share_before_cold": max(cached),
        "threads": default_workers(),
        "range_bytes": max(found.nbytes for found in ranges),
    }


def _expert_ranges(file: Path) -> list[Range]:
    """Each expert's tensors lie side by side in the file, for safetensors stores them in the order of their names."""
    tensors = sorted((t for t in read_header(file) if ".experts." in t.name), key=lambda t: t.offset)
    ranges = []
    for _, group in groupby(tensors, key=lambda t: re.sub(r"(experts\.\d+)\..*", r"\1", t.name)):
        parts = list(group)
        start, end = parts[0].offset, parts[-1].offset + parts[-1].nbytes
        assert end - start == sum(part.nbytes for part in parts)
        ranges.append(Range(file, start, end - start))
    return ranges


def _read_all(ranges: list[Range]) -> float:
    """Bytes per second over all ranges."""
    workers = default_workers()
    largest = max(found.nbytes for found in ranges)
    buffers = [np.ones(largest, dtype=np.uint8) for _ in range(workers)]  # ones: memory that is really there
    opened = {path: os.open(path, os.O_RDONLY) for path in {found.path for found in ranges}}
    for descriptor in opened.values():
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead past the end of a range

    def read(worker: int) -> None:
        target = memoryview(buffers[worker])
        for found in ranges[worker::workers]:
            done = 0
            while done < found.nbytes:
                done += os.preadv(opened[found.path], [target[done : found.nbytes]], found.start + done)

    try:
        with ThreadPoolExecutor(workers) as pool:
            started = time.perf_counter()
            list(pool.map(read, range(workers)))
            elapsed_s = time.perf_counter() - started
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return sum(found.nbytes for found in ranges) / elapsed_s


if __name__ == "__main__":
    serve(measure_bandwidth)
