"""Decode a model that is larger than the memory it may use: this package, accelerate's disk offload, llama.cpp.

    python -m benchmarks.disk.capped                     # the made model of 2.25 GiB under a cap of 1.25 GiB
    python -m benchmarks.disk.capped --quick             # every line of it once, figures without meaning
    python -m benchmarks.disk.capped --llama-cpp PYTHON  # with a row of llama.cpp; see llama_cpp.md

The cap holds for the page cache as well; `cap.py` says how. All rows have the same cap, one after the other.
"""

from __future__ import annotations

import shutil
import signal
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import MADE, RESULTS
from benchmarks.decode import protocol as protocols
from benchmarks.decode.limit import per_token, seconds_per_token
from benchmarks.decode.rows import Row
from benchmarks.harness import shape as shapes
from benchmarks.harness.cap import CapError, capped
from benchmarks.harness.job import JobFailedError, run_job
from benchmarks.harness.make_model import made_model
from benchmarks.harness.outcome import show, write
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.limit import Crossing, as_share, least_s
from transformers_moe_offload.bench.tables import Table, mib
from transformers_moe_offload.config import Budget

PROMISE = 6.0
"""Times as many tokens per second as the best row of accelerate."""


def measure_capped(
    cap: Annotated[str, typer.Option(help="Memory that each row may use, such as '1.25GiB'.")] = "1.25GiB",
    budget: Annotated[int, typer.Option(min=1, max=100, help="Percent of the experts that a row keeps in RAM.")] = 25,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one run.")] = False,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens measured in each run.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 3,
    llama_cpp: Annotated[Path | None, typer.Option(help="An interpreter with llama-cpp-python and gguf.")] = None,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure all rows under one cap."""
    shape = shapes.QUICK if quick else shapes.Shape()
    protocol = protocols.QUICK if quick else replace(protocols.Protocol(), decode_tokens=decode_tokens, runs=runs)
    cap_bytes = Budget.parse(cap, "--cap").nbytes
    if cap_bytes is None:
        raise typer.BadParameter(f"{cap!r} is not a number of bytes such as '1.25GiB'", param_hint="--cap")
    if not quick and cap_bytes >= shape.all_expert_bytes:
        raise typer.BadParameter(
            f"{cap_bytes:,} bytes hold all experts, which take {shape.all_expert_bytes:,}; choose fewer",
            param_hint="--cap",
        )
    folder = made_model(shape, made)
    common = {"folder": str(folder), "protocol": asdict(protocol)}
    scratch = folder.with_name(f"{folder.name}.offloaded")
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(folder, threads),
        "shape": asdict(shape),
        "protocol": asdict(protocol),
        "cap_bytes": cap_bytes,
        "expert_bytes": shape.expert_bytes,
        "all_expert_bytes": shape.all_expert_bytes,
        "bandwidth": run_job(
            "benchmarks.decode.measure:measure_bandwidth",
            {"folder": str(folder), "repeats": min(3, protocol.runs)},
            threads,
        ),
        "rows": {},
        "failed": {},
    }
    resident = Row(kind="ours", budget_percent=100, arithmetic="fast")
    job = common | {"row": asdict(resident), "scratch": str(scratch)}
    result["resident"] = run_job("benchmarks.decode.measure:measure", job, threads)["warm"]
    jobs = {
        row.name: (
            "benchmarks.decode.measure:measure_under_cap",
            common | {"row": asdict(row), "scratch": str(scratch)},
        )
        for row in _rows(budget)
    }
    if llama_cpp is not None:
        path = folder.with_suffix(".gguf")
        run_job(
            "benchmarks.disk.gguf_model:write_gguf",
            {"folder": str(folder), "path": str(path)},
            threads,
            python=str(llama_cpp),
        )
        job = {"path": str(path), "protocol": asdict(protocol), "vocab": shape.vocab}
        jobs["llama.cpp mmap"] = ("benchmarks.disk.llama_cpp_row:measure_llama_cpp", job)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no group stays behind
    for name, (work, job) in jobs.items():
        typer.echo(f"measuring {name}", err=True)
        python = {"python": str(llama_cpp)} if "llama_cpp" in work else {}
        try:
            with capped(cap_bytes) as limit:
                result["capped_by"] = limit.name
                row = run_job(work, job, threads, cap=limit, **python)
                result["rows"][name] = row | {"peak_bytes": limit.peak()}
        except CapError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except JobFailedError as failure:
            result["failed"][name] = str(failure)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    result["facts"] = {
        "model": f"Qwen3-MoE, bfloat16, random weights: {asdict(shape)}",
        "protocol": f"greedy, batch 1: {asdict(protocol)}",
        "disk, cold": f"{mib(result['bandwidth']['cold_bytes_per_s'])} MiB/s",
    }
    show(write(results, "capped", result), result, [table(result)], [verdict(result)])
    raise typer.Exit(1 if result["failed"] else 0)


def _rows(percent: int) -> list[Row]:
    return [
        Row(kind="ours", budget_percent=percent, arithmetic="fast", is_copied=True),
        Row(kind="accelerate", implementation="eager"),
        Row(kind="accelerate", implementation="grouped_mm"),
        Row(kind="accelerate", implementation="eager", budget_percent=percent),
        Row(kind="accelerate", implementation="grouped_mm", budget_percent=percent),
    ]


def table(result: dict[str, Any]) -> Table:
    """Speed under the cap, and for our row how much of the limit that is and which side of it is larger."""
    title = f"Under a cap of {mib(result['cap_bytes'])} MiB by {result['capped_by']} (disk: MiB read per token)"
    header = ["row", "tokens/s", "disk", "times accelerate", "limit", "reached", "peak, MiB"]
    rows, best = [], _best(result)
    for name, row in result["rows"].items():
        token_s = seconds_per_token(row["capped"])
        limit_s = _limit_s(result, row)
        rows.append([
            name,
            f"{1 / token_s:.2f}",
            mib(per_token(row["capped"], "read_bytes")) if "read_bytes" in row["capped"][0] else "",
            f"{best / token_s:.1f}" if best else "",
            f"{1 / limit_s:.2f}" if limit_s else "",
            as_share(limit_s / token_s) if limit_s else "",
            mib(row["peak_bytes"]) if row["peak_bytes"] else "",
        ])  # fmt: skip
    return Table(title, header, rows)


def verdict(result: dict[str, Any]) -> tuple[str, bool | None]:
    """What is promised, with the figures, and whether it holds."""
    best = _best(result)
    ours = next((row for name, row in result["rows"].items() if name.startswith("ours")), None)
    promise = f"at least {PROMISE:g} times the tokens per second of accelerate from disk, under the same cap"
    if best is None or ours is None:
        return f"{promise}: rows missing", None
    token_s = seconds_per_token(ours["capped"])
    needed_s = per_token(ours["capped"], "misses") * result["expert_bytes"] / result["bandwidth"]["cold_bytes_per_s"]
    parts = f"disk {needed_s * 1e3:.0f} ms, resident compute {seconds_per_token(result['resident']) * 1e3:.0f} ms"
    return f"{promise}: {best / token_s:.1f} times; a token takes {token_s * 1e3:.0f} ms ({parts})", (
        best / token_s >= PROMISE
    )


def _best(result: dict[str, Any]) -> float | None:
    """Seconds per token of accelerate's fastest row."""
    rows = (row for name, row in result["rows"].items() if name.startswith("accelerate"))
    return min((seconds_per_token(row["capped"]) for row in rows), default=None)


def _limit_s(result: dict[str, Any], row: dict[str, Any]) -> float | None:
    if "misses" not in row["capped"][0]:
        return None
    needed = per_token(row["capped"], "misses") * result["expert_bytes"]
    return least_s([Crossing(needed, result["bandwidth"]["cold_bytes_per_s"])], seconds_per_token(result["resident"]))


if __name__ == "__main__":
    typer.run(measure_capped)
