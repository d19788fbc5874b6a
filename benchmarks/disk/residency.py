"""Decode with part of the experts resident, as a ratio of the speed with all of them; beams and a batch beside it.

    python -m benchmarks.disk.residency          # the small trained model, and one shaped like OLMoE
    python -m benchmarks.disk.residency --quick  # every line of it once, figures without meaning

The page cache is warm. `mapped` uses experts where the page cache has them, `copied` reads them into slots.
The OLMoE-shaped model has random weights but routers that prefer some experts: `shape.py` says how much and why.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks import MADE, RESULTS, TINY_MOE
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.series import compared_models, measured_rows
from transformers_moe_offload.bench.tables import Table, mib

PERCENTS = (10, 25, 40, 50, 100)
COMPARED = 40

AS_FAST = 0.8
"""Of fully resident speed, with `COMPARED` percent resident."""

BEAM_COST = 2.0
"""Times as long as a greedy step."""


def measure_residency(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each residency.")] = 5,
    most_minutes: Annotated[float, typer.Option(help="Begin no row after so long; run again to go on.")] = math.inf,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure both models, mapped and copied."""
    lengths = {"prompt_tokens": 16, "steps": 4 if quick else 64, "rounds": 1 if quick else rounds}
    common = {"percents": PERCENTS, "compared": COMPARED} | lengths
    jobs = {
        f"{name}, {'copied' if is_copied else 'mapped'}": common | {"folder": str(folder), "is_copied": is_copied}
        for name, folder in compared_models(quick, made).items()
        for is_copied in (False, True)
    }
    result = measured_rows(
        "benchmarks.disk.resident:measure_residencies",
        jobs,
        TINY_MOE,
        threads,
        parts=made / "parts",
        most_s=60 * most_minutes,
    ) | {"lengths": lengths}
    result["facts"] = {"lengths": str(lengths)} | {
        row: f"{found['model']['experts']} experts of {mib(found['model']['expert_bytes'])} MiB in all, "
        f"{found['model']['dtype']}, {'mapped' if found['model']['is_mapped'] else 'copied'}, with {found['passage']}"
        for row, found in result["rows"].items()
    }
    show(write(results, "residency", result), result, tables(result), verdicts(result))
    raise typer.Exit(1 if result["failed"] else 0)


def tables(result: dict[str, Any]) -> list[Table]:
    """Decoding by residency, and what beams and a batch cost."""
    decoding, others = [], []
    for row, found in result["rows"].items():
        resident_s = _resident_seconds(result, row)
        for percent, runs in found["runs"].items():
            speeds = sorted(len(one["forward_s"]) / one["elapsed_s"] for one in runs)
            decoding.append([
                f"{row}, {percent}%",
                f"{1 / _seconds(runs):.2f}",
                f"{speeds[0]:.2f} to {speeds[-1]:.2f}",
                f"{median(one['hits'] / one['asked'] for one in runs):.1%}",
                mib(median(one["disk_bytes"] / len(one["forward_s"]) for one in runs)),
                f"{resident_s / _seconds(runs):.0%}",
            ])  # fmt: skip
        greedy, beams = found["searched"]["decode"], found["searched"]["beam 5"]
        others.append([
            row,
            f"{_seconds(beams) / _seconds(greedy):.2f}",
            f"{_asked(beams) / _asked(greedy):.2f}",
            f"{_read_bytes(found, beams) / _read_bytes(found, greedy):.2f}",
            *(f"{_moved(batch, found):.0f} of {batch['wanted']}" for batch in found["batch"].values()),
        ])  # fmt: skip
    budgets = [f"{COMPARED}%", f"{PERCENTS[-1]}%", "one slot"]
    return [
        Table(
            "Decoding, page cache warm (moved: MiB per token)",
            ["model", "tokens/s", "min to max", "hit rate", "moved", "of resident"],
            decoding,
        ),
        Table(
            f"Beam 5 at {COMPARED}%, as multiples of greedy; batch 8: experts moved, of those wanted, by budget",
            ["model", "time per step", "experts per step", "weights read per step", *budgets],
            others,
        ),
    ]


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """What is promised, for each model as it is loaded by default."""
    found: list[Verdict] = []
    for row, measured in result["rows"].items():
        share = _resident_seconds(result, row) / _seconds(measured["runs"][str(COMPARED)])
        greedy, beams = measured["searched"]["decode"], measured["searched"]["beam 5"]
        cost = _seconds(beams) / _seconds(greedy)
        more_bytes = _read_bytes(measured, beams) / _read_bytes(measured, greedy)
        found.append(
            (f"{row}: {COMPARED}% resident, at least {AS_FAST:.0%} of resident: {share:.0%}", share >= AS_FAST)
        )
        promise = f"{row}: beam 5 at most {BEAM_COST:g} greedy steps"
        found.append((f"{promise}: {cost:.2f}, reading {more_bytes:.2f} times the weights", cost <= BEAM_COST))
        once = all(_moves_once(batch, measured) for batch in measured["batch"].values())
        found.append((f"{row}: batch 8 moves each wanted expert that is not resident once", once))
    return found


def _moves_once(batch: dict[str, Any], found: dict[str, Any]) -> bool:
    """Wanted as the routers count it; what moved is what was wanted and was not there."""
    run = batch["run"]
    return run["asked"] == batch["wanted"] and _moved(batch, found) == run["asked"] - run["hits"]


def _moved(batch: dict[str, Any], found: dict[str, Any]) -> float:
    one = found["model"]["expert_bytes"] / found["model"]["experts"]
    return batch["run"]["disk_bytes"] / one


def _resident_seconds(result: dict[str, Any], row: str) -> float:
    """Per token, with everything resident, in whichever of a model's rows is faster."""
    model = row.rpartition(",")[0]
    alike = [found for name, found in result["rows"].items() if name.rpartition(",")[0] == model]
    return min(_seconds(found["runs"][str(PERCENTS[-1])]) for found in alike)


def _seconds(runs: list[dict[str, Any]]) -> float:
    return median(one["elapsed_s"] / len(one["forward_s"]) for one in runs)


def _read_bytes(found: dict[str, Any], runs: list[dict[str, Any]]) -> float:
    """Weights that a step multiplies with: experts and everything else. Reading them is what a step of few tokens takes
    its time for."""
    model = found["model"]
    return float(found["dense_bytes"] + _asked(runs) * model["expert_bytes"] / model["experts"])


def _asked(runs: list[dict[str, Any]]) -> float:
    return median(one["asked"] / len(one["forward_s"]) for one in runs)


if __name__ == "__main__":
    typer.run(measure_residency)
