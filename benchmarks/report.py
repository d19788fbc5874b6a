"""Show results: tables for the terminal, and the same tables as Markdown."""

from __future__ import annotations

from statistics import median
from typing import Any

from limit import State, limit_s, per_token, seconds_per_token
from rich import box
from rich.table import Table as RichTable

MIB = 2**20
Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""


def tables(results: dict[str, Any]) -> list[Table]:
    """Decoding with a warm and with a cold page cache, and memory and loading."""
    return [_decoding(results, "warm"), _decoding(results, "cold"), _memory(results)]


def for_terminal(table: Table) -> RichTable:
    """A table for rich."""
    title, header, rows = table
    shown = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, name in enumerate(header):
        shown.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def as_markdown(results: dict[str, Any]) -> str:
    """A page with the conditions and all tables."""
    lines = [f"# Decode, {results['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in _conditions(results).items()]
    for title, header, rows in tables(results):
        lines += ["", f"## {title}", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
        lines += [_line(row) for row in rows]
    lines += [f"\n`{name}` failed: {error}" for name, error in results["failed"].items()]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _conditions(results: dict[str, Any]) -> dict[str, str]:
    where, shape, protocol, bandwidth = (results[key] for key in ("conditions", "shape", "protocol", "bandwidth"))
    threads = {row["torch_threads"] for row in results["rows"].values()}
    return {
        "machine": f"{where['cpu']}, {where['cores']} cores, {where['ram_bytes'] / 2**30:.1f} GiB RAM",
        "system": f"{where['os']}, files on {where['file_system']}, load average {where['load_average']:.2f} before",
        "software": ", ".join(f"{name} {number}" for name, number in where["packages"].items()),
        "torch threads": ", ".join(map(str, sorted(threads))),
        "commit": where["commit"],
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
            _mib(per_token(runs, "disk_bytes" if "disk_bytes" in runs[0] else "fetched_bytes")),
            _mib(per_token(runs, "read_bytes")),
            _mib(per_token(runs, "rchar")),
            f"{1 / least_s:.2f}" if least_s else "",
            f"{least_s / token_s:.0%}" if least_s else "",
        ])  # fmt: skip
    return title, header, rows


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
            _mib(row["load_peak_rss"]),
            _mib(row["peak_rss"]),
            _mib(row["baseline_rss"]),
            _mib(row["cache_bytes"]) if "cache_bytes" in row else "",
            _mib(row["copied_bytes"]),
        ]
        for name, row in results["rows"].items()
    ]
    return "Loading, page cache cold, and memory (RSS), in MiB", header, rows


def _mib(nbytes: float) -> str:
    return f"{nbytes / MIB:.1f}"
