"""Serve a thousand adapters from disk with a small cache, beside ten in memory.

    python -m benchmarks.adapters.adapters          # about five minutes, 1.6 GB of disk for the made mixtures
    python -m benchmarks.adapters.adapters --quick  # every line of it once, figures without meaning

A mixture of adapters that has a hundred times the adapters needs a hundred times the disk; the question is what else it
needs. The tokens are random, so that each takes other adapters: the worst case for a cache.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from transformers import AutoModelForCausalLM

from benchmarks import MADE, RESULTS
from benchmarks.adapters.make_adapters import SMALL, MixtureShape, made_mixture
from benchmarks.decode.loading import FetchCounter
from benchmarks.decode.measure import run
from benchmarks.decode.protocol import Protocol
from benchmarks.harness.counters import peak_rss
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.series import measured_rows
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.page_cache import drop
from transformers_moe_offload.bench.tables import Table, mib

FEW, MANY = 10, 1000


def compare_numbers(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 5,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
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
        "benchmarks.adapters.adapters:measure_row",
        {name: job | lengths for name, job in jobs.items()},
        folders[many],
        threads,
    )
    result["facts"] = {
        "model": f"{shape}, random weights in bfloat16, one router for each feed-forward block",
        "lengths": str(lengths),
        "cache": f"{few_bytes:,} bytes: what {FEW} adapters take",
    }
    show(write(results, "adapters", result), result, [_table(result)], _verdicts(result, many))
    raise typer.Exit(1 if result["failed"] else 0)


def measure_row(
    folder: str, rounds: int, decode_tokens: int, budget: str | None = None, is_cold: bool = False
) -> dict[str, Any]:
    """Runs of one mixture with all adapters in memory, or, with a budget, with those in use."""
    before_rss, started = peak_rss(), time.perf_counter()
    options = {} if budget is None else {"moe_offload": OffloadConfig(cache_budget=budget, mmap=False)}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    load_s = time.perf_counter() - started
    files = sorted(Path(folder).rglob("adapter_model.safetensors"))
    protocol, nothing = Protocol(decode_tokens=decode_tokens), FetchCounter(model)
    run(model, protocol, nothing)
    runs = []
    for _ in range(rounds):
        if is_cold:
            drop(files)
        runs.append(run(model, protocol, nothing))
    plan = model.moe_offload.plan if budget is not None else None
    return {
        "runs": runs,
        "load_s": load_s,
        "rss_bytes": peak_rss() - before_rss,
        "adapter_bytes": sum(file.stat().st_size for file in files),
        "cache_bytes": None if plan is None else plan.cache_bytes,
    }


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
