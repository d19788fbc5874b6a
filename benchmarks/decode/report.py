"""Show results: tables for the terminal, and the same tables as Markdown."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.decode.limit import State, limit_s, per_token, seconds_per_token
from transformers_moe_offload.bench.conditions import described
from transformers_moe_offload.bench.limit import as_share
from transformers_moe_offload.bench.tables import MIB, Table, mib
from transformers_moe_offload.bench.tables import as_markdown as table_as_markdown


def tables(results: dict[str, Any]) -> list[Table]:
    """Decoding with a warm and with a cold page cache, and memory and loading."""
    return [_decoding(results, "warm"), _decoding(results, "cold"), _memory(results)]


def as_markdown(results: dict[str, Any]) -> str:
    """A page with the conditions and all tables."""
    lines = [f"# Decode, {results['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in _conditions(results).items()]
    lines += [f"\n{table_as_markdown(table)}".rstrip("\n") for table in tables(results)]
    lines += [f"\n`{name}` failed: {error}" for name, error in results["failed"].items()]
    return "\n".join(lines) + "\n"


def _conditions(results: dict[str, Any]) -> dict[str, str]:
    where, shape, protocol, bandwidth = (results[key] for key in ("conditions", "shape", "protocol", "bandwidth"))
    threads = {row["torch_threads"] for row in results["rows"].values()}
    return described(where) | {
        "torch threads": ", ".join(map(str, sorted(threads))),
        "model": f"Qwen3-MoE, bfloat16, random weights: {shape}",
        "experts": f"{results['all_expert_bytes'] / 2**30:.2f} GiB, {results['expert_bytes'] / MIB:.2f} MiB each",
        "protocol": f"greedy, batch 1: {protocol}",
        "disk, cold": f"{bandwidth['cold_bytes_per_s'] / MIB:.0f} MiB/s with {bandwidth['threads']} threads",
        "page cache, warm": f"{bandwidth['warm_bytes_per_s'] / MIB:.0f} MiB/s with {bandwidth['threads']} threads",
    }


def _decoding(results: dict[str, Any], state: State) -> Table:
    title = f"Decoding, page cache {state} (fetched, disk, read(): MiB per token; limit: tokens/s)"
    header = ["row", "tokens/s", "min to max", "hit rate", "fetched", "disk", "read()", "limit", "reached"]
    rows = []
    for name, row in results["rows"].items():
        runs = row[state]
        token_s, least_s = seconds_per_token(runs), limit_s(results, name, state)
        speeds = sorted(run["tokens"] / run["elapsed_s"] for run in runs)
        rows.append([
            name,
            f"{1 / token_s:.2f}",
            f"{speeds[0]:.2f} to {speeds[-1]:.2f}",
            _hit_rate(runs),
            mib(per_token(runs, "disk_bytes" if "disk_bytes" in runs[0] else "fetched_bytes")),
            mib(per_token(runs, "read_bytes")),
            mib(per_token(runs, "rchar")),
            f"{1 / least_s:.2f}" if least_s else "",
            as_share(least_s / token_s) if least_s else "",
        ])  # fmt: skip
    return Table(title, header, rows)


def _hit_rate(runs: list[dict[str, Any]]) -> str:
    if "hits" not in runs[0]:
        return ""
    return f"{median(run['hits'] / (run['hits'] + run['late_hits'] + run['misses']) for run in runs):.1%}"


def _memory(results: dict[str, Any]) -> Table:
    header = ["row", "load, s", "peak loading", "peak", "imports alone", "cache", "copied to disk"]
    rows = [
        [
            name,
            f"{row['load_s']:.1f}",
            mib(row["load_peak_rss"]),
            mib(row["peak_rss"]),
            mib(row["baseline_rss"]),
            mib(row["cache_bytes"]) if "cache_bytes" in row else "",
            mib(row["copied_bytes"]),
        ]
        for name, row in results["rows"].items()
    ]
    return Table("Loading, page cache cold, and memory (RSS), in MiB", header, rows)
