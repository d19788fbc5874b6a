"""Serve a thousand adapters from disk with a small cache, beside ten in memory.

    python benchmarks/adapters.py            # about five minutes, 1.6 GB of disk for the made mixtures
    python benchmarks/adapters.py --quick    # every line of it once, figures without meaning

A mixture of adapters that has a hundred times the adapters needs a hundred times the disk; the question is what else it
needs. The tokens are random, so that each takes other adapters: the worst case for a cache.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from make_adapters import SMALL, MixtureShape, made_mixture
from outcome import HERE, Verdict, show, write
from series import measured_rows

from transformers_moe_offload.bench.tables import Table, mib

FEW, MANY = 10, 1000


def compare_numbers(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 5,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = HERE / "made",
    results: Annotated[Path, typer.Option(help="Where results are written.")] = HERE / "results",
) -> None:
    """Measure a few and many adapters, in memory and offloaded."""
    shape, many = (SMALL, 30) if quick else (MixtureShape(), MANY)
    folders = {number: made_mixture(shape, number, made) for number in (FEW, many)}
    lengths = {"decode_tokens": 4 if quick else 48, "rounds": 1 if quick else rounds}
    few_bytes = _adapter_bytes(folders[FEW])
    jobs: dict[str, dict[str, Any]] = {}
    for number, folder in folders.items():
        jobs[f"{number}, in memory"] = {"folder": str(folder)}
        # What ten adapters take is the cache of a thousand.
        jobs[f"{number}, offloaded"] = {"folder": str(folder), "budget": str(few_bytes)}
        jobs[f"{number}, offloaded, disk cold"] = jobs[f"{number}, offloaded"] | {"is_cold": True}
    result = measured_rows(
        "adapter_row.py", {name: job | lengths for name, job in jobs.items()}, folders[many], threads
    )
    result["facts"] = {
        "model": f"{shape}, random weights in bfloat16, one router for each feed-forward block",
        "lengths": str(lengths),
        "cache": f"{few_bytes:,} bytes: what {FEW} adapters take",
    }
    show(write(results, "adapters", result), result, [_table(result)], _verdicts(result, many))
    raise typer.Exit(1 if result["failed"] else 0)


def _adapter_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("adapter_model.safetensors"))


def _table(result: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{1 / _seconds(found):.1f}",
            f"{_hit_rate(found):.0%}" if found["cache_bytes"] else "",
            mib(found["adapter_bytes"]),
            mib(found["rss_bytes"]),
            f"{found['load_s']:.1f}",
        ]
        for name, found in result["rows"].items()
    ]
    return Table(
        "Decoding at batch 1 (MiB; memory: the process's peak beyond its imports)",
        ["adapters", "tokens/s", "hits", "on disk", "memory", "load s"],
        rows,
    )


def _verdicts(result: dict[str, Any], many: int) -> list[Verdict]:
    few, offloaded, in_memory = (
        result["rows"].get(name) for name in (f"{FEW}, in memory", f"{many}, offloaded", f"{many}, in memory")
    )
    if few is None or offloaded is None or in_memory is None:
        return []
    speed = _seconds(few) / _seconds(offloaded)
    more = (offloaded["rss_bytes"] - few["rss_bytes"]) / 2**20
    return [
        (
            f"{many} adapters offloaded: {speed:.2f} times the tokens/s of {FEW} in memory, {more:+.0f} MiB of memory "
            f"({(in_memory['rss_bytes'] - few['rss_bytes']) / 2**20:+.0f} MiB with all of them in memory)",
            None,
        )
    ]


def _hit_rate(found: dict[str, Any]) -> float:
    hits, asked = (
        sum(one[name] for one in found["runs"] for name in names)
        for names in (("hits",), ("hits", "late_hits", "misses"))
    )
    return hits / asked


def _seconds(found: dict[str, Any]) -> float:
    return median(one["elapsed_s"] / one["tokens"] for one in found["runs"])


if __name__ == "__main__":
    typer.run(compare_numbers)
