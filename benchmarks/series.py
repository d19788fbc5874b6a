"""Measure a series of rows, each in a process of its own, and keep what came of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import shape as shapes
import typer
from job import JobFailedError, run_job
from make_model import made_model
from outcome import HERE

from transformers_moe_offload.bench.conditions import conditions

TINY_MOE = HERE.parent / "examples" / "models" / "tiny-moe"


def compared_models(quick: bool, made: Path) -> dict[str, Path]:
    """The folders of the small trained model and of one shaped like OLMoE, which is made if it is not there."""
    return {
        "tiny-moe": TINY_MOE,
        "OLMoE-shaped": made_model(shapes.QUICK_OLMOE if quick else shapes.OLMOE, made),
    }


def measured_rows(script: str, jobs: Mapping[str, dict[str, Any]], folder: Path, threads: int | None) -> dict[str, Any]:
    """Date, conditions around a folder, and by name the answers of a script to some jobs, or why there is none."""
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(folder, threads),
        "rows": {},
        "failed": {},
    }
    for name, job in jobs.items():
        started = time.monotonic()
        typer.echo(f"measuring {name}", err=True)
        try:
            result["rows"][name] = run_job(script, job, threads)
        except JobFailedError as failure:
            result["failed"][name] = str(failure)
        typer.echo(f"  took {time.monotonic() - started:.0f} s", err=True)
    return result
