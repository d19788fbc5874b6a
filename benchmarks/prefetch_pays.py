"""Is anything slower with prefetch than without, and where is it faster?

python benchmarks/prefetch_pays.py            # the small trained model, and one shaped like OLMoE
python benchmarks/prefetch_pays.py --quick    # every line of it once, figures without meaning
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from outcome import HERE, Verdict, show, write
from series import TINY_MOE, compared_models, measured_rows

from transformers_moe_offload.bench.tables import Table
from transformers_moe_offload.bench.workload import Workload

SLOWER = 0.03
"""By how much a row may be slower with prefetch."""

SETTLING_STEPS = 200
"""Of one kind of work: a trial of the controller has 176 at most."""

BUDGETS = ("10%", "25%", "50%")


def measure_prefetch(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round, one budget.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 5,
    most_minutes: Annotated[float, typer.Option(help="Begin no row after so long; run again to go on.")] = math.inf,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = HERE / "made",
    results: Annotated[Path, typer.Option(help="Where results are written.")] = HERE / "results",
) -> None:
    """Measure every model, budget and page cache state; cold means that experts come from the disk."""
    decode = Workload(name="decode", prompt_tokens=16, steps=4 if quick else 16)
    others = [
        Workload(name="batch 8", prompt_tokens=16, steps=2 if quick else 8, batch=8),
        Workload(name="prefill 256", prompt_tokens=32 if quick else 256),
    ]
    rounds = 1 if quick else rounds
    jobs = {
        f"{name}, {budget}, {state}": {
            "folder": str(folder),
            "budget": budget,
            "state": state,
            "works": [asdict(work) for work in (decode, *(others if budget == BUDGETS[1] else ()))],
            "rounds": rounds,
            "is_copied": True,
            "settling_steps": 0 if quick else SETTLING_STEPS,
        }
        for name, folder in compared_models(quick, made).items()
        for budget in (BUDGETS[1:2] if quick else BUDGETS)
        for state in ("warm", "cold")
    }
    result = measured_rows("in_turns.py", jobs, TINY_MOE, threads, parts=made / "parts", most_s=60 * most_minutes)
    result["facts"] = {"lengths": f"{decode.steps} tokens after 16, 8 of a batch of 8; {rounds} rounds"} | {
        row: f"{found['model']['slots']} slots, with {found['passage']}" for row, found in result["rows"].items()
    }
    show(write(results, "prefetch-pays", result), result, [table(result)], [verdict(result)])
    raise typer.Exit(1 if result["failed"] else 0)


def gains(result: dict[str, Any]) -> dict[str, float]:
    """Seconds without prefetch over seconds with it, by row."""
    return {
        f"{row}, {work}": _typical_s(runs["off"]) / _typical_s(runs["on"])
        for row, found in result["rows"].items()
        for work, runs in found["works"].items()
    }


def _typical_s(runs: list[dict[str, Any]]) -> float:
    """Seconds of a run of which every forward takes what it takes in most rounds.

    Not the median of whole runs: on a virtual machine now and then one forward takes seconds longer than ever.
    """
    return sum(map(median, zip(*(one["forward_s"] for one in runs), strict=True)))


def table(result: dict[str, Any]) -> Table:
    """Gain, and what prefetch did: experts brought in ahead that were used, and for nothing, of those asked for."""
    rows = []
    for row, found in result["rows"].items():
        for work, runs in found["works"].items():
            name, on = f"{row}, {work}", runs["on"]
            rows.append([
                name,
                f"{gains(result)[name] - 1:+.1%}",
                f"{median(one['hits'] / one['asked'] for one in runs['off']):.1%}",
                f"{median(one['hits'] / one['asked'] for one in on):.1%}",
                f"{median(one['prefetch_used'] / one['asked'] for one in on):.1%}",
                f"{median(one['prefetch_wasted'] / one['asked'] for one in on):.1%}",
            ])  # fmt: skip
    return Table("With prefetch", ["row", "faster by", "hits without", "hits", "used", "wasted"], rows)


def verdict(result: dict[str, Any]) -> Verdict:
    """The worst row decides."""
    found = gains(result)
    if not found:
        return "prefetch: rows missing", None
    worst = min(found, key=found.__getitem__)
    promise = f"prefetch makes no row more than {SLOWER:.0%} slower"
    return f"{promise}; the worst is {worst}: {found[worst] - 1:+.1%}", found[worst] >= 1 - SLOWER


if __name__ == "__main__":
    typer.run(measure_prefetch)
