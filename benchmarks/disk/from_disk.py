"""How much of the machine's limit is reached while experts come from the disk?

    python -m benchmarks.disk.from_disk          # the small trained model, and one shaped like OLMoE
    python -m benchmarks.disk.from_disk --quick  # every line of it once, figures without meaning

The page cache is emptied before every forward, so that every miss is a read of the disk. README.md has the protocol.
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
from transformers_moe_offload.bench.limit import Crossing, as_share, is_possible, least_s
from transformers_moe_offload.bench.tables import Table, mib

BUDGETS = ("10%", "25%", "50%")

REACHED = 0.6
"""Of the limit, at every budget."""

MANNERS = {
    "through the page cache": {"past_cache": False, "ahead": False},
    "past the page cache": {"past_cache": True, "ahead": False},
    "past it and ahead": {"past_cache": True, "ahead": True},
}
"""How experts are read, and whether some are before they are asked for."""


def measure_from_disk(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round, one budget.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 5,
    most_minutes: Annotated[float, typer.Option(help="Begin no row after so long; run again to go on.")] = math.inf,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure both models at every budget, reading through the page cache, past it, and ahead."""
    rounds = 1 if quick else rounds
    steps, prompt = (2, 32) if quick else (16, 2048)
    jobs = {
        f"{name}, {budget}, {way}": {
            "folder": str(folder),
            "budget": budget,
            **manner,
            "rounds": rounds,
            "steps": steps,
            "prefill_tokens": prompt if budget == BUDGETS[1] else None,
        }
        for name, folder in compared_models(quick, made).items()
        for budget in (BUDGETS[1:2] if quick else BUDGETS)
        for way, manner in MANNERS.items()
    }
    result = measured_rows(
        "benchmarks.disk.disk_row:measure_from_disk",
        jobs,
        TINY_MOE,
        threads,
        parts=made / "parts",
        most_s=60 * most_minutes,
    )
    result["facts"] = {
        "lengths": f"{steps} tokens after 16, prefill of {prompt} (or the model's positions); {rounds} runs"
    }
    result["facts"] |= {
        row: f"{found['model']['slots']} slots of {found['model']['experts']}, with {found['passage']}; "
        f"{found['threads']} readers"
        for row, found in result["rows"].items()
    }
    show(write(results, "from-disk", result), result, [table(result)], verdicts(result))
    raise typer.Exit(1 if result["failed"] else 0)


def limits(found: dict[str, Any]) -> list[float]:
    """Seconds that each run's forward takes at least: the disk's for the bytes it needed, or resident compute.

    The disk's speed is what it was around the run: the mean of before and after, in the faster of the two manners.
    """
    resident_s = found["resident_s"]
    return [
        least_s([Crossing(run["needed_bytes"] / len(run["forward_s"]), run["bytes_per_s"])], resident_s)
        for run in found["runs"]
    ]


def reached(found: dict[str, Any]) -> float:
    """Median over the runs of the limit's time over the measured one."""
    pairs = zip(limits(found), found["runs"], strict=True)
    return median(least / (run["elapsed_s"] / len(run["forward_s"])) for least, run in pairs)


def table(result: dict[str, Any]) -> Table:
    """Times of a forward, of the disk's part alone and with everything resident; what it needs, what the disk gives."""
    rows = []
    for row, found in result["rows"].items():
        for name, work in found["works"].items():
            runs = work["runs"]
            needed = median(run["needed_bytes"] / len(run["forward_s"]) for run in runs)
            rows.append([
                f"{row}, {name}",
                f"{median(run['elapsed_s'] / len(run['forward_s']) for run in runs) * 1e3:.1f}",
                f"{median(run['hits'] / run['asked'] for run in runs):.1%}",
                mib(needed),
                mib(median(run["bytes_per_s"] for run in runs)),
                f"{median(run['needed_bytes'] / len(run['forward_s']) / run['bytes_per_s'] for run in runs) * 1e3:.1f}",
                f"{work['resident_s'] * 1e3:.1f}",
                as_share(reached(work)),
            ])  # fmt: skip
    header = ["row", "ms", "hit rate", "needed", "disk", "disk alone", "resident", "reached"]
    return Table("A forward, its experts from the disk (times: ms; needed: MiB; disk: MiB/s)", header, rows)


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """The better manner of each row counts: which one it is depends on the disk."""
    best: dict[str, float] = {}
    for row, found in result["rows"].items():
        for name, work in found["works"].items():
            key = f"{row.rpartition(', ')[0]}, {name}"
            best[key] = max(best.get(key, 0.0), reached(work))
    return [
        (
            f"{key}: at least {REACHED:.0%} of the limit: {as_share(share)}",
            share >= REACHED if is_possible(share) else None,
        )
        for key, share in best.items()
    ]


if __name__ == "__main__":
    typer.run(measure_from_disk)
