"""Measure one row of `from_disk.py`: forwards whose experts come from the disk, and the disk around each of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig, PrefetchConfig
from transformers_moe_offload.bench.bandwidth import expert_ranges, read_all, read_all_past_cache, sample
from transformers_moe_offload.bench.layers import files_of, store_of
from transformers_moe_offload.bench.page_cache import drop
from transformers_moe_offload.bench.passage import passage_for
from transformers_moe_offload.bench.session import facts, repeated, unmap_dense
from transformers_moe_offload.bench.workload import Workload, max_positions, run, seconds_per_forward
from transformers_moe_offload.disk_io.file import FileRange
from transformers_moe_offload.disk_io.reader_pool import default_workers

SAMPLE_BYTES = 512 << 20
"""Of one look at the disk: half a second of most."""


def measure_from_disk(
    folder: str, budget: str, past_cache: bool, ahead: bool, rounds: int, steps: int, prefill_tokens: int | None
) -> dict[str, Any]:
    """Runs of decoding and, if wanted, of a prompt; with each the disk's bytes per second around it."""
    # Runs are too short for the controller: a trial of it has up to 176 steps.
    prefetch = PrefetchConfig(adaptive=False) if ahead else None
    config = OffloadConfig(cache_budget=budget, mmap=False, direct_io=past_cache, prefetch=prefetch)
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
    unmap_dense(model)
    passage, store, threads = passage_for(model, folder), store_of(model), default_workers()
    files, ranges = files_of(store), sample(expert_ranges(store), SAMPLE_BYTES)
    works = [Workload(name="decode", prompt_tokens=16, steps=steps)]
    if prefill_tokens is not None:
        length = min(prefill_tokens, max_positions(model) or prefill_tokens)
        works.append(Workload(name=f"prefill {length}", prompt_tokens=length))
    answer: dict[str, Any] = {"model": facts(model), "passage": passage.source, "threads": threads, "works": {}}
    for work in works:
        runs = []
        run(model, work, passage)
        before = _disk(files, ranges, threads)
        for _ in range(rounds):
            done = run(model, work, passage, before_forward=lambda: drop(files))
            after = _disk(files, ranges, threads)
            runs.append(asdict(done) | {"bytes_per_s": (before + after) / 2})
            before = after
        answer["works"][work.name] = {"runs": runs}
    model.moe_offload.resize("100%")
    for work in works:
        resident = seconds_per_forward(repeated(model, work, passage, min(rounds, 3), "cold"))
        answer["works"][work.name]["resident_s"] = resident
    return answer


def _disk(files: list[Any], ranges: list[FileRange], threads: int) -> float:
    """Bytes per second of cold experts, through the page cache or past it, whichever is faster."""
    speeds = []
    for read in (read_all, read_all_past_cache):
        drop(files)
        speeds.append(read(ranges, threads))
    return max(speeds)
