"""Measure a series of rows, each in a process of its own, and keep what came of them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import typer

from benchmarks import TINY_MOE
from benchmarks.harness import shape as shapes
from benchmarks.harness.job import JobFailedError, run_job
from benchmarks.harness.make_model import made_model
from transformers_moe_offload.bench.conditions import conditions


def compared_models(quick: bool, made: Path) -> dict[str, Path]:
    """The folders of the small trained model and of one shaped like OLMoE, which is made if it is not there."""
    return {
        "tiny-moe": TINY_MOE,
        "OLMoE-shaped": made_model(shapes.QUICK_OLMOE if quick else shapes.OLMOE, made),
    }


def measured_rows(
    work: str,
    jobs: Mapping[str, dict[str, Any]],
    folder: Path,
    threads: int | None,
    *,
    parts: Path | None = None,
    most_s: float = math.inf,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Date, conditions around a folder, and by name what `work` (see `run_job`) answered to some jobs, or why there is
    no answer.

    With a folder for `parts`, every answer is kept there until all jobs of the series have one: after `most_s` seconds
    no further job begins and the process ends; the next run of the same series, at the same commit, goes on from there.
    `variables` are those of `run_job`.
    """
    answered = run_job if variables is None else partial(run_job, variables=variables)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(folder, threads),
        "rows": {},
        "failed": {},
    }
    kept = None if parts is None else parts / _digest(work, jobs, threads, result["conditions"]["commit"])
    ends = time.monotonic() + most_s
    for name, job in jobs.items():
        answer = None if kept is None else kept / f"{_digest(name)}.json"
        if answer is not None and answer.exists():
            result["rows"][name] = json.loads(answer.read_text())
            continue
        if time.monotonic() > ends:
            typer.echo(f"{len(jobs) - len(result['rows'])} of {len(jobs)} rows are left; run this again", err=True)
            raise typer.Exit(3)
        typer.echo(f"measuring {name}", err=True)
        started = time.monotonic()
        try:
            result["rows"][name] = answered(work, job, threads)
        except JobFailedError as failure:
            result["failed"][name] = str(failure)
        else:
            if answer is not None:
                answer.parent.mkdir(parents=True, exist_ok=True)
                answer.write_text(json.dumps(result["rows"][name]))
        typer.echo(f"  took {time.monotonic() - started:.0f} s", err=True)
    if kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    return result


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=dict).encode()).hexdigest()[:16]
