"""Decode with a made model, in RAM, from disk by accelerate, and by this package at several budgets.

    python -m benchmarks.decode.decode                         # everything, about half an hour
    python -m benchmarks.decode.decode --quick                 # every line of it once, figures without meaning
    python -m benchmarks.decode.decode --check results/X.json  # hold a result against what is promised

The protocol is in README.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import MADE, RESULTS
from benchmarks.decode import protocol as protocols
from benchmarks.decode import rows as all_the_rows
from benchmarks.decode.check import verdicts
from benchmarks.harness import shape as shapes
from benchmarks.harness.job import JobFailedError, run_job


def decode(
    check: Annotated[Path | None, typer.Option(help="Measure nothing; judge this result file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one run, one row of every kind.")] = False,
    layers: Annotated[int | None, typer.Option(help="Sparse layers of the made model.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts per layer.")] = None,
    experts_per_token: Annotated[int | None, typer.Option(help="Experts each token takes.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Intermediate size of an expert.")] = None,
    embedding_std: Annotated[float | None, typer.Option(help="1: uniform routing; 0.02: routing that repeats.")] = None,
    decode_tokens: Annotated[int | None, typer.Option(help="Tokens measured in each run.")] = None,
    runs: Annotated[int | None, typer.Option(help="Runs of each page cache state.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only rows of this name, such as 'ours 25% fast'.")] = None,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Compare ways of running a mixture-of-experts model that does not fit."""
    console = Console()
    if check is not None:
        raise typer.Exit(_judge(console, json.loads(check.read_text())))
    sizes = {"layers": layers, "experts": experts, "experts_per_token": experts_per_token}
    sizes |= {"hidden": hidden, "intermediate": intermediate, "embedding_std": embedding_std}
    shape = replace(shapes.QUICK if quick else shapes.Shape(), **_given(sizes))
    lengths = _given({"decode_tokens": decode_tokens, "runs": runs})
    protocol = replace(protocols.QUICK if quick else protocols.Protocol(), **lengths)
    chosen = _chosen_rows(row or (all_the_rows.QUICK if quick else ()))

    # Here, because judging a file should not have to wait for torch.
    from benchmarks.decode.report import as_markdown, tables
    from benchmarks.harness.make_model import made_model
    from transformers_moe_offload.bench.conditions import conditions
    from transformers_moe_offload.bench.tables import show

    folder = made_model(shape, made)
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(folder, threads),
    } | _measure_all(folder, shape, protocol, chosen, threads)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"decode-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(result))
    for table in tables(result):
        show(console, table)
    _judge(console, result)
    console.print(f"written to {path} and {path.with_suffix('.md').name}", soft_wrap=True)
    for name, error in result["failed"].items():
        console.print(f"{name} failed: {error}", style="red", soft_wrap=True, markup=False)
    raise typer.Exit(1 if result["failed"] else 0)


def _measure_all(
    folder: Path,
    shape: shapes.Shape,
    protocol: protocols.Protocol,
    chosen: list[all_the_rows.Row],
    threads: int | None,
) -> dict[str, Any]:
    """Bandwidths first, then one row after another, each in a process of its own."""
    files = sorted(folder.glob("*.safetensors"))
    total_bytes = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    result: dict[str, Any] = {
        "shape": asdict(shape),
        "protocol": asdict(protocol),
        "expert_bytes": shape.expert_bytes,
        "all_expert_bytes": shape.all_expert_bytes,
        "dense_bytes": total_bytes - shape.all_expert_bytes,
        "shard_bytes": max(file.stat().st_size for file in files),
        "rows": {},
        "failed": {},
    }
    scratch = folder.with_name(f"{folder.name}.offloaded")
    with Progress() as progress:
        task = progress.add_task("bandwidth", total=len(chosen) + 1)
        job = {"folder": str(folder), "repeats": min(3, protocol.runs)}
        result["bandwidth"] = run_job("benchmarks.decode.measure:measure_bandwidth", job, threads)
        for row in chosen:
            progress.update(task, advance=1, description=row.name)
            job = {"row": asdict(row), "folder": str(folder), "scratch": str(scratch), "protocol": asdict(protocol)}
            try:
                result["rows"][row.name] = run_job("benchmarks.decode.measure:measure", job, threads)
            except JobFailedError as failure:
                result["failed"][row.name] = str(failure)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        progress.update(task, advance=1, description="done")
    return result


def _judge(console: Console, result: dict[str, Any]) -> int:
    """Print what was promised and what came of it; returns how many promises are broken or could not be judged."""
    signs = {True: "[green]kept[/]", False: "[red]broken[/]", None: "[yellow]not measured[/]"}
    found = verdicts(result)
    for verdict in found:
        console.print(f"{signs[verdict.is_kept]}  {verdict.promise}: {verdict.figures}", soft_wrap=True)
    return sum(verdict.is_kept is not True for verdict in found)


def _chosen_rows(names: list[str] | tuple[str, ...]) -> list[all_the_rows.Row]:
    known = {row.name: row for row in all_the_rows.all_rows()}
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="--row")
    return [known[name] for name in names] or list(known.values())


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    typer.run(decode)
