"""What the figures of `gpu.py` come to: speeds, limits, tables, and which promises hold."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.gpu.rows import (
    COMPUTE,
    EAGER,
    EAGER_PARTLY,
    GRAPHED,
    GRAPHED_PARTLY,
    HOST,
    NAIVE,
    PUBLISHED_FULL,
    RESIDENT,
    RESIDENT_GRAPHED,
)
from benchmarks.harness.outcome import Verdict
from transformers_moe_offload.bench.limit import Crossing, as_share, is_possible, least_s
from transformers_moe_offload.bench.tables import Table, mib

MOST_US = {EAGER: 60.0, GRAPHED: 5.0}
"""Of the host, for a sparse layer. A replayed graph calls none; what is left is noise."""

LEAST_REACHED = {EAGER: 0.6, GRAPHED: 0.75}
"""Of the limit, at batch 1."""

LEAST_OF_RESIDENT = 0.8
TIMES_PUBLISHED = 3.0
PREFILL_REACHED, PREFILL = 0.6, 2048
KERNEL_REACHED = 0.6

Row = dict[str, Any]
Rows = dict[str, Row]
"""What was measured for one model, number of bits and cap, by row."""


UNKNOWN = {"link": None, "gpu_bytes_per_s": None}
"""Bandwidths, where measuring them has failed."""


def seconds(row: Row, work: str = "decode") -> float:
    """Of a forward in median; `work` is `decode` or the length of a prompt. Multiplied up where there are fewer layers
    than in the published model, for accelerate's row only."""
    runs = row["decode"] if work == "decode" else row["prefill"][work]
    scale = row["all_layers"] / row["layers"] if "all_layers" in row else 1.0
    return scale * median(median(one["forward_s"]) for one in runs)


def needed_bytes(row: Row, work: str = "decode") -> float:
    """Of experts that had to cross the link for a forward."""
    runs = row["decode"] if work == "decode" else row["prefill"][work]
    return median(one["needed_bytes"] / len(one["forward_s"]) for one in runs)


def hit_rate(row: Row) -> float:
    """Of the experts that decoding asked for."""
    return median(one["hits"] / max(1, one["asked"]) for one in row["decode"])


def resident_s(rows: Rows, made: dict[str, Any], bandwidth: dict[str, Any], work: str = "decode") -> float | None:
    """Seconds of a forward with every expert in GPU memory: measured, or else what it takes to read the weights."""
    found = [seconds(rows[name], work) for name in (RESIDENT, RESIDENT_GRAPHED) if _has(rows, name, work)]
    if found:
        return min(found)
    if bandwidth["gpu_bytes_per_s"] is None:
        return None
    per_token = made["experts_per_token"] * made["layers"] / made["experts"]
    return float((made["dense_bytes"] + per_token * made["expert_bytes"]) / bandwidth["gpu_bytes_per_s"])


def limit_s(row: Row, resident: float | None, bandwidth: dict[str, Any], work: str = "decode") -> float | None:
    """Seconds that a forward of a row takes at least: what it misses over the link, or resident compute."""
    if bandwidth["link"] is None or resident is None or "model" not in row:
        return None
    return least_s([Crossing(needed_bytes(row, work), bandwidth["link"]["pinned_bytes_per_s"])], resident)


def _has(rows: Rows, name: str, work: str = "decode") -> bool:
    row = rows.get(name, {"left_out": ""})
    return "left_out" not in row and (work == "decode" or work in row["prefill"])


def tables(result: dict[str, Any]) -> list[Table]:
    """One table for each model, number of bits and cap."""
    return [_table(name, setting, result) for name, setting in result["settings"].items()]


HEADER = [
    "row",
    "tokens/s",
    "times naive",
    "hits",
    "link",
    "host us",
    "limit",
    "reached",
    "prefill",
    "GPU",
    "pinned",
]


def _table(name: str, setting: dict[str, Any], result: dict[str, Any]) -> Table:
    rows, made, bandwidth = setting["rows"], setting["made"], result["bandwidth"].get(setting["made"]["name"], UNKNOWN)
    lines = []
    naive = seconds(rows[NAIVE]) if _has(rows, NAIVE) else None
    resident = resident_s(rows, made, bandwidth)
    for row_name, row in rows.items():
        if "left_out" in row:
            lines.append([row_name, "left out", *[""] * (len(HEADER) - 2)])
            continue
        token_s, least = seconds(row), limit_s(row, resident, bandwidth)
        memory = row["memory"]
        lines.append([
            row_name,
            f"{1 / token_s:.2f}",
            f"{naive / token_s:.2f}" if naive else "",
            f"{hit_rate(row):.0%}" if "model" in row else "",
            mib(needed_bytes(row)) if "model" in row else "",
            f"{row['host_us_per_layer']:.0f}" if row.get("host_us_per_layer") is not None else "",
            f"{1 / least:.2f}" if least else "",
            as_share(least / token_s) if least else "",
            " / ".join(f"{int(length) / seconds(row, length):.0f}" for length in row["prefill"]),
            "" if memory["gpu_bytes"] is None else mib(memory["gpu_bytes"]),
            "" if memory["pinned_bytes"] is None else mib(memory["pinned_bytes"]),
        ])  # fmt: skip
    lengths = next((list(row["prefill"]) for row in rows.values() if "prefill" in row), [])
    title = f"{name} (prefill: tokens/s of {' / '.join(lengths)}; link: MiB per token; memory: peak MiB)"
    return Table(title, HEADER, lines)


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """What is promised, for each model, number of bits and cap."""
    found: list[Verdict] = []
    for name, setting in result["settings"].items():
        bandwidth = result["bandwidth"].get(setting["made"]["name"], UNKNOWN)
        judged = [*_speed(setting["rows"], setting["made"], bandwidth), *_equal(setting["rows"])]
        found += [(f"{name}: {promise}", is_kept) for promise, is_kept in judged]
    found += [_kernel(model, bandwidth) for model, bandwidth in result["bandwidth"].items()]
    return found


def _speed(rows: Rows, made: dict[str, Any], bandwidth: dict[str, Any]) -> Iterator[Verdict]:
    is_gpu, resident = bandwidth["link"] is not None, resident_s(rows, made, bandwidth)
    for name, most in MOST_US.items():
        promise = f"{name}: at most {most:g} us of the host per sparse layer"
        yield _at_most(promise, rows[name]["host_us_per_layer"] if is_gpu and _has(rows, name) else None, most)
    for name, least in LEAST_REACHED.items():
        limit = limit_s(rows[name], resident, bandwidth) if _has(rows, name) else None
        promise = f"{name}: at least {least:.0%} of the limit"
        yield _of_limit(promise, limit / seconds(rows[name]) if limit else None, least)
    for name, whole in ((EAGER_PARTLY, RESIDENT), (GRAPHED_PARTLY, RESIDENT_GRAPHED)):
        are_there = is_gpu and _has(rows, name) and _has(rows, whole)
        share = seconds(rows[whole]) / seconds(rows[name]) if are_there else None
        yield _at_least(f"{name}: at least {LEAST_OF_RESIDENT:.0%} of resident speed", share, LEAST_OF_RESIDENT)
    ours = [seconds(rows[name]) for name in (HOST, COMPUTE, EAGER, GRAPHED) if _has(rows, name)]
    are_there = is_gpu and bool(ours) and _has(rows, PUBLISHED_FULL)
    times = seconds(rows[PUBLISHED_FULL]) / min(ours) if are_there else None
    yield _at_least(f"the best row: at least {TIMES_PUBLISHED:g} times {PUBLISHED_FULL!r}", times, TIMES_PUBLISHED)
    work = str(PREFILL)
    limit = (
        limit_s(rows[EAGER], resident_s(rows, made, bandwidth, work), bandwidth, work)
        if _has(rows, EAGER, work)
        else None
    )
    promise = f"a prompt of {PREFILL} tokens: at least {PREFILL_REACHED:.0%} of the link's limit"
    yield _of_limit(promise, limit / seconds(rows[EAGER], work) if limit else None, PREFILL_REACHED)


def _equal(rows: Rows) -> Iterator[Verdict]:
    digests = {row["digest"] for row in rows.values() if row.get("digest")}
    names = [name for name, row in rows.items() if row.get("digest")]
    promise = f"equal logits, bit for bit, whatever is resident and whether graphed or not ({len(names)} rows)"
    yield promise, len(digests) == 1 if len(names) > 1 else None


def _kernel(model: str, bandwidth: dict[str, Any]) -> Verdict:
    promise = f"{model}: kernels on resident experts at least {KERNEL_REACHED:.0%} of the GPU memory's bandwidth"
    if bandwidth["gpu_bytes_per_s"] is None:
        return promise, None
    reached = bandwidth["record_bytes"] / bandwidth["kernel"]["resident_s"]
    return _of_limit(promise, reached / bandwidth["gpu_bytes_per_s"], KERNEL_REACHED)


def _of_limit(promise: str, share: float | None, least: float) -> Verdict:
    """A limit that was measured wrong proves nothing."""
    if share is None or is_possible(share):
        return _at_least(promise, share, least)
    return f"{promise}: {as_share(share)}", None


def _at_least(promise: str, figure: float | None, least: float) -> Verdict:
    return (promise, None) if figure is None else (f"{promise}: {figure:.2f}", figure >= least)


def _at_most(promise: str, figure: float | None, most: float) -> Verdict:
    return (promise, None) if figure is None else (f"{promise}: {figure:.1f}", figure <= most)
