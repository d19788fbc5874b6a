"""Measure everything about one loaded model: bandwidths, dispatch, and each workload with a warm and a cold page cache.

Warm: everything has been read by the runs before. Cold: the experts' files are dropped from the page cache before every
single forward, as if the model were too large for the page cache to keep any of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch

from transformers_moe_offload.bench.bandwidth import disk_bandwidth, expert_ranges, link_bandwidth, ram_bandwidth
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.dispatch import dispatch
from transformers_moe_offload.bench.layers import files_of, sparse_layers, store_of
from transformers_moe_offload.bench.limit import Crossing, least_s
from transformers_moe_offload.bench.page_cache import can_drop, drop, warm
from transformers_moe_offload.bench.passage import Passage
from transformers_moe_offload.bench.workload import (
    Protocol,
    Run,
    Workload,
    max_positions,
    run,
    seconds_per_forward,
    workloads,
)
from transformers_moe_offload.disk_io.reader_pool import default_workers
from transformers_moe_offload.system.free_memory import available_bytes

Progress = Callable[[str], None]
"""Called with a description of what comes next."""

STATES = ("warm", "cold")


def measure(model: Any, passage: Passage, protocol: Protocol, progress: Progress = lambda what: None) -> dict[str, Any]:
    """All results, ready for JSON. The model's cache is empty afterwards; its budget is what it was."""
    works, notes = workloads(protocol, max_positions(model))
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "conditions": conditions(files_of(store_of(model))[0]) | {"torch_threads": torch.get_num_threads()},
        "model": facts(model),
        "protocol": asdict(protocol),
        "passage": passage.source,
        "notes": notes,
    }
    progress("bandwidth")
    result["bandwidth"] = bandwidths(model, protocol.bandwidth_repeats)
    progress("dispatch")
    prompt = passage.sequences(1, protocol.prompt_tokens).to(model.device)
    result["dispatch"] = dispatch(model, prompt, protocol.dispatch_passes)
    states = [state for state in STATES if _is_possible(state, model, notes)]
    done: dict[str, dict[str, list[Run]]] = {work.name: {} for work in works}
    for work in works:
        for state in states:
            progress(f"{work.name}, {state}")
            done[work.name][state] = repeated(model, work, passage, protocol.runs, state, protocol.row_s)
    resident, result["dispatch_resident"] = _resident(model, works, passage, protocol, notes, progress)
    result["workloads"] = {}
    for work in works:
        runs = done[work.name]
        resident_s = resident.get(work.name) or _without_stalls(chain.from_iterable(runs.values()))
        entry = result["workloads"][work.name] = {"workload": asdict(work), "resident_s": resident_s}
        for state in states:
            speeds = _speeds(state, result["bandwidth"], is_mapped=result["model"]["is_mapped"])
            entry[state] = [asdict(one) for one in runs[state]]
            entry[f"{state}_summary"] = summary(runs[state], work, resident_s, speeds)
    return result


def facts(model: Any) -> dict[str, Any]:
    """What was measured: the model and how its experts were offloaded."""
    plan, layers = model.moe_offload.plan, sparse_layers(model)
    dense = {id(tensor): tensor.nbytes for tensor in model.parameters() if tensor.device.type != "meta"}
    return {
        "name": _name(model.config.name_or_path),
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "expert_dtype": store_of(model).layers[layers[0][1].index].spec.fields[0].dtype,
        "device": str(layers[0][1].device),
        "sparse_layers": len(layers),
        "experts": plan.num_experts,
        "expert_bytes": plan.expert_bytes,
        "dense_bytes": sum(dense.values()),
        "slots": plan.num_slots,
        "is_mapped": all(pool.is_mapped for pool in plan.pools),
        "cache_bytes": plan.cache_bytes,
        "config": model.moe_offload.config.to_dict(),
    }


def _name(name_or_path: str) -> str:
    """An id on the Hub, or a folder's name: its path is not published."""
    return Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path


def bandwidths(model: Any, repeats: int) -> dict[str, Any]:
    """Disk, RAM, and the link where there is a GPU."""
    _, layer = sparse_layers(model)[0]
    store = store_of(model)
    threads = model.moe_offload.config.io_workers or default_workers()
    record_bytes = store.layout(layer.index, 0).nbytes
    found: dict[str, Any] = {
        "disk": disk_bandwidth(expert_ranges(store), threads, repeats),
        "ram": ram_bandwidth(repeats),
        "link": None,
    }
    if layer.device.type == "cuda":
        found["link"] = link_bandwidth(layer.device, record_bytes, repeats)
    return found


def repeated(
    model: Any, work: Workload, passage: Passage, runs: int, state: str, most_s: float = math.inf
) -> list[Run]:
    """One run that is not counted, then those that are: `runs`, fewer after `most_s` seconds, two at least."""
    files = files_of(store_of(model))
    if state == "cold":
        unmap_dense(model)
    else:
        warm(files)
    run(model, work, passage)
    done: list[Run] = []
    ends = time.monotonic() + most_s
    while len(done) < min(runs, 2) or (len(done) < runs and time.monotonic() < ends):
        done.append(run(model, work, passage, before_forward=lambda: drop(files) if state == "cold" else None))
    return done


def summary(runs: list[Run], work: Workload, resident_s: float, speeds: dict[str, float]) -> dict[str, Any]:
    """Medians of some runs, the limit and what sets it, and how much of it was reached.

    `speeds` are bandwidths in bytes per second, by the field of `Run` that counts the bytes they apply to.
    """
    forward_s = seconds_per_forward(runs)
    crossings = {
        counter: Crossing(median(min(one.needed_bytes, getattr(one, counter)) for one in runs) / work.forwards, speed)
        for counter, speed in speeds.items()
    }
    limit_s = least_s(crossings.values(), resident_s)
    slowest = max(crossings, key=lambda counter: crossings[counter].seconds, default=None)
    is_bound = slowest is not None and crossings[slowest].seconds > resident_s
    reached = sorted(work.tokens / one.elapsed_s for one in runs)
    return {
        "runs": len(runs),
        "tokens_per_s": work.tokens / (forward_s * work.forwards),
        "slowest_tokens_per_s": reached[0],
        "fastest_tokens_per_s": reached[-1],
        "hit_rate": median(one.hits / one.asked for one in runs),
        "misses_per_forward": median(one.misses for one in runs) / work.forwards,
        "disk_bytes_per_forward": median(one.disk_bytes for one in runs) / work.forwards,
        "stall_ms_per_forward": median(one.stall_ms for one in runs) / work.forwards,
        "crossing_s": {counter: crossing.seconds for counter, crossing in crossings.items()},
        "limit_tokens_per_s": work.tokens / (limit_s * work.forwards),
        "limited_by": slowest.removesuffix("_bytes") if slowest is not None and is_bound else "compute",
        "reached": limit_s / forward_s,
        "share_of_resident_speed": resident_s / forward_s,
    }


def _speeds(state: str, bandwidth: dict[str, Any], *, is_mapped: bool) -> dict[str, float]:
    """The bandwidths that limit a run. Mapped experts that are in the page cache are not read from the disk."""
    speeds = {}
    if state == "cold" or not is_mapped:
        speeds["disk_bytes"] = bandwidth["disk"][f"{state}_bytes_per_s"]
    if bandwidth["link"] is not None:
        speeds["device_bytes"] = bandwidth["link"]["pinned_bytes_per_s"]
    return speeds


def _resident(
    model: Any, works: list[Workload], passage: Passage, protocol: Protocol, notes: list[str], progress: Progress
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Seconds of a forward by workload, and `dispatch`, with every expert in the cache; empty if that has no room."""
    runtime = model.moe_offload
    budget, plan = runtime.config.cache_budget, runtime.plan
    room = sum(available_bytes(device) for device in {pool.device for pool in plan.pools}) + plan.cache_bytes
    if plan.num_slots < plan.num_experts and plan.expert_bytes > room:
        notes.append(
            f"all experts take {plan.expert_bytes:,} bytes, but there is room for {room:,}: the time of resident "
            f"compute is that of each workload without its stalls, which is more than it would be"
        )
        return {}, None
    runtime.resize("100%")
    try:
        seconds = {}
        for work in works:
            progress(f"{work.name}, resident")
            runs = repeated(model, work, passage, protocol.runs, "warm", protocol.row_s)
            seconds[work.name] = seconds_per_forward(runs)
        progress("dispatch, resident")
        prompt = passage.sequences(1, protocol.prompt_tokens).to(model.device)
        return seconds, dispatch(model, prompt, protocol.dispatch_passes)
    finally:
        runtime.resize(budget)


def _without_stalls(runs: Iterable[Run]) -> float:
    return min((one.elapsed_s - one.stall_ms / 1e3) / len(one.forward_s) for one in runs)


def _is_possible(state: str, model: Any, notes: list[str]) -> bool:
    nbytes = sum(file.stat().st_size for file in files_of(store_of(model)))
    room = available_bytes(torch.device("cpu"))
    if state == "warm" and nbytes > room:
        notes.append(f"warm: the files of {nbytes:,} bytes do not fit into the {room:,} bytes of RAM that are free")
        return False
    if state == "cold" and not can_drop():
        notes.append("cold: only Linux can be asked to forget files that it has cached")
        return False
    return True


def unmap_dense(model: Any) -> None:
    """Copy parameters that are still mapped from the files, so that dropping the files affects experts only."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
