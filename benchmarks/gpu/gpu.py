"""Decoding on a GPU that not all experts fit into: this package in all its ways, accelerate, and the ablation of
arXiv 2312.17238, held against what the link and the GPU's memory allow.

    python -m benchmarks.gpu.gpu          # all models, 4 bits, 8 GB: hours, in parts of 9 minutes
    python -m benchmarks.gpu.gpu --model OLMoE-1B-7B --bits 4 --bits 2 --cap 8GB --cap 12GB
    python -m benchmarks.gpu.gpu --quick  # on a CPU, what needs no GPU; figures without meaning

Models have the shapes of published ones and random weights (`models.py`). No row begins after `--most-minutes`; run
the same command again, at the same commit, until it has written its results.
"""

from __future__ import annotations

import math
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import MADE, RESULTS
from benchmarks.gpu.make import make_model
from benchmarks.gpu.models import LOCALITY, POPULARITY, PUBLISHED, QUICK
from benchmarks.gpu.report import tables, verdicts
from benchmarks.gpu.rows import QUICK as QUICK_ROWS
from benchmarks.gpu.rows import ROWS
from benchmarks.harness.job import run_job
from benchmarks.harness.outcome import show, write
from benchmarks.harness.series import measured_rows
from transformers_moe_offload.config import Budget
from transformers_moe_offload.kernels import gpu

ON_GPU: dict[str, str] = {}
"""Added to the environment of what is measured: nothing."""

IN_INTERPRETER = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}

LENGTHS = {"prompt_tokens": 16, "steps": 48, "prefills": [128, 512, 2048], "runs": 3}
QUICK_LENGTHS = {"prompt_tokens": 20, "steps": 2, "prefills": [24], "runs": 1}

Settings = dict[str, dict[str, Any]]
"""Models with their number of bits and cap, by what they are called in the report."""

REPEATS = 5
"""Of each measurement of a bandwidth; the fastest counts."""


def measure_gpu(
    model: Annotated[list[str] | None, typer.Option(help="Of `models.py`; default is all.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Of the experts; attention has 4.")] = None,
    cap: Annotated[list[str] | None, typer.Option(help="GPU memory that a row may use.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Rows to measure; default is all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models, on the CPU.")] = False,
    most_minutes: Annotated[float, typer.Option(help="Begin no row after so long; run again to go on.")] = 7,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure all rows for every model, number of bits and cap."""
    expect_gpu(quick=quick)
    ends = math.inf if quick else time.monotonic() + 60 * most_minutes
    names = chosen("--row", row, list(QUICK_ROWS) if quick else [one.name for one in ROWS])
    caps = [None] if quick else sizes("--cap", cap or ["8GB"])
    settings: Settings = {}
    for name in chosen("--model", model, list(QUICK if quick else PUBLISHED)):
        for nbits in bits or [4]:
            if time.monotonic() > ends:
                typer.echo("not all models are made; run this again", err=True)
                raise typer.Exit(3)
            facts = made_model(name, nbits, made, quick=quick)
            for cap_bytes in caps:
                of_cap = "no cap" if cap_bytes is None else f"{cap_bytes / 1e9:g} GB"
                settings[f"{name}, {nbits} bits, {of_cap}"] = {"cap_bytes": cap_bytes, "made": facts}
    work = jobs(settings, names, made, quick=quick)
    result = measured_rows(
        "benchmarks.gpu.measure:measure_rows",
        work,
        made,
        threads,
        parts=made / "parts",
        most_s=ends - time.monotonic(),
        variables=IN_INTERPRETER if quick else ON_GPU,
    )
    gather(result, settings, work)
    result["facts"] = facts_of(result, quick=quick)
    show(write(results, "gpu", result), result, tables(result), verdicts(result))
    raise typer.Exit(1 if result["failed"] else 0)


def expect_gpu(*, quick: bool) -> None:
    """One clear error where there is nothing to measure."""
    if quick:
        missing = None if find_spec("triton") else "Triton is not installed, whose interpreter --quick runs"
    else:
        missing = gpu.missing()
    if missing is not None:
        others = "" if quick else "; --quick runs what needs no GPU, with figures that mean nothing"
        typer.echo(f"nothing to measure: {missing}{others}", err=True)
        raise typer.Exit(2)


def chosen(option: str, given: list[str] | None, known: list[str]) -> list[str]:
    """What was asked for, or everything."""
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint=option)
    return given or known


def sizes(option: str, given: list[str]) -> list[int]:
    """In bytes, of texts such as '8GB'."""
    found = [Budget.parse(text, option).nbytes for text in given]
    for text, nbytes in zip(given, found, strict=True):
        if nbytes is None:
            raise typer.BadParameter(f"{text!r} is not a number of bytes such as '8GB'", param_hint=option)
    return [nbytes for nbytes in found if nbytes is not None]


def made_model(name: str, nbits: int, made: Path, *, quick: bool) -> dict[str, Any]:
    """What was made, in a process of its own where it takes a GPU's memory."""
    folder = made / f"{name.replace(' ', '-')}-{nbits}bit"
    job = {"folder": str(folder), "model": name, "nbits": nbits}
    typer.echo(f"making {folder.name}, if it is not there", err=True)
    facts: dict[str, Any] = (
        make_model(**job) if quick else run_job("benchmarks.gpu.make:make_model", job, None, variables=ON_GPU)
    )
    return facts | {"name": folder.name}


def jobs(
    settings: dict[str, dict[str, Any]], names: list[str], made: Path, *, quick: bool
) -> dict[str, dict[str, Any]]:
    """Bandwidths once for each model, and each row, in a process of its own; with `quick` all that a model has in one,
    as importing takes longer than that."""
    found: dict[str, dict[str, Any]] = {}
    for name, setting in settings.items():
        of_model = setting["made"]
        common = {"folder": str(made / of_model["name"]), "dense_bytes": of_model["dense_bytes"]}
        common |= QUICK_LENGTHS if quick else LENGTHS
        under_cap = common | {"cap_bytes": setting["cap_bytes"]}
        if quick:
            found[name] = under_cap | {"rows": names, "repeats": 1}
            continue
        found[f"bandwidths with {of_model['name']}"] = common | {"cap_bytes": None, "rows": [], "repeats": REPEATS}
        found |= {f"{name}: {row}": under_cap | {"rows": [row], "repeats": 0} for row in names}
    return found


def gather(result: dict[str, Any], settings: Settings, work: dict[str, dict[str, Any]]) -> None:
    """Put what jobs have answered where it belongs: rows to their setting, bandwidths to their model."""
    result["settings"] = {name: setting | {"rows": {}} for name, setting in settings.items()}
    result["bandwidth"] = {}
    for job, answer in result.pop("rows").items():
        for name, setting in result["settings"].items():
            if job == name or job.startswith(f"{name}: "):
                setting["rows"] |= answer["rows"]
        if answer["bandwidth"] is not None:
            result["bandwidth"][Path(work[job]["folder"]).name] = answer["bandwidth"]


def facts_of(result: dict[str, Any], *, quick: bool) -> dict[str, str]:
    """What a reader has to know beside the machine."""
    facts = {
        "lengths": str(QUICK_LENGTHS if quick else LENGTHS),
        "routing": f"random tokens through routers that prefer some experts (popularity {POPULARITY}: gpu/models.py); "
        f"{LOCALITY}; hits are what came of it",
        "weights": "random; experts by rounding to nearest, groups of 64 with 8-bit scales, attention in 4 bits",
    }
    for setting in result["settings"].values():
        made = setting["made"]
        if made["layers"] < made["all_layers"]:
            facts[made["name"]] = f"{made['layers']} of {made['all_layers']} layers: more do not fit into RAM and disk"
    for name, found in result["bandwidth"].items():
        facts[f"bandwidths with {name}"] = bandwidths(found)
    for name, setting in result["settings"].items():
        for row, measured in setting["rows"].items():
            if "left_out" in measured:
                facts[f"{name}: {row}"] = f"left out: {measured['left_out']}"
            elif measured.get("layers", 0) < measured.get("all_layers", 0):
                facts[f"{name}: {row}"] = f"measured with {measured['layers']} of {measured['all_layers']} layers"
    return facts


def bandwidths(found: dict[str, Any]) -> str:
    """In GB/s, on one line."""
    parts = {"RAM": found["ram"]["copy_bytes_per_s"]}
    if found["link"] is not None:
        parts |= {
            "link, pinned": found["link"]["pinned_bytes_per_s"],
            "pageable": found["link"]["pageable_bytes_per_s"],
        }
        parts |= {"GPU memory": found["gpu_bytes_per_s"]}
    kernel, nbytes = found["kernel"], found["record_bytes"]
    parts |= {"kernel on resident experts": nbytes / kernel["resident_s"], "in place": nbytes / kernel["read_s"]}
    said = ", ".join(f"{name} {speed / 1e9:.1f}" for name, speed in parts.items())
    return f"{said} GB/s" + (f", driver {found['driver']}" if found["driver"] else "")


if __name__ == "__main__":
    typer.run(measure_gpu)
