"""Is anything slower with prefetch than without, and where is it faster?

python -m benchmarks.prefetch.prefetch_pays          # the small trained model, and one shaped like OLMoE
python -m benchmarks.prefetch.prefetch_pays --quick  # every line of it once, figures without meaning
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks import MADE, RESULTS, TINY_MOE
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.series import compared_models, measured_rows
from transformers_moe_offload.bench.tables import Table
from transformers_moe_offload.bench.workload import Workload

SLOWER = 0.03
"""By how much a row may be slower with prefetch."""

SURE = 0.95
"""Least probability with which an interval holds the median of many more rounds."""

SETTLING_STEPS = 200
"""Of one kind of work: a trial of the controller has 176 at most."""

BUDGETS = ("10%", "25%", "50%")


def measure_prefetch(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round, one budget.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 9,
    most_minutes: Annotated[float, typer.Option(help="Begin no row after so long; run again to go on.")] = math.inf,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
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
    result = measured_rows(
        "benchmarks.prefetch.in_turns:measure_in_turns",
        jobs,
        TINY_MOE,
        threads,
        parts=made / "parts",
        most_s=60 * most_minutes,
    )
    result["facts"] = {"lengths": f"{decode.steps} tokens after 16, 8 of a batch of 8; {rounds} rounds"} | {
        row: f"{found['model']['slots']} slots, with {found['passage']}" for row, found in result["rows"].items()
    }
    show(write(results, "prefetch-pays", result), result, [table(result)], [verdict(result)])
    raise typer.Exit(1 if result["failed"] else 0)


class Gain(NamedTuple):
    """Seconds of one way over those of another, round by round."""

    typical: float
    """Median over the rounds."""
    least: float
    most: float
    """An interval for it; minus and plus infinity with fewer than six rounds."""

    def __str__(self) -> str:
        return f"{self.typical - 1:+.1%} ({self.least - 1:+.1%} to {self.most - 1:+.1%})"


def gains(result: dict[str, Any], way: str = "on") -> dict[str, Gain]:
    """Seconds without prefetch over seconds with it, or over those of the control, by row."""
    return {
        f"{row}, {work}": paired(runs["off"], runs[way])
        for row, found in result["rows"].items()
        for work, runs in found["works"].items()
    }


def paired(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Gain:
    """Compare runs of the same forwards, pair by pair: what slows the machine down for a while slows both of a round.

    Of a round's forwards the median counts: on a virtual machine now and then one takes seconds longer than ever.
    """
    ratios = sorted(
        median(a / b for a, b in zip(one["forward_s"], other["forward_s"], strict=True))
        for one, other in zip(first, second, strict=True)
    )
    beyond = _ratios_beyond(len(ratios))
    least, most = (0.0, math.inf) if beyond is None else (ratios[beyond], ratios[-1 - beyond])
    return Gain(median(ratios), least, most)


def _ratios_beyond(number: int) -> int | None:
    """How many of so many sorted ratios may be left out at either end of an interval for their median.

    Each ratio lies above the true median as often as below, so that the number of those below is binomial (the sign
    test's interval). None where even all of them are too few.
    """
    outside, beyond = 0.0, None
    for left_out in range(number // 2):
        outside += 2 * math.comb(number, left_out) / 2**number
        if outside > 1 - SURE:
            break
        beyond = left_out
    return beyond


def table(result: dict[str, Any]) -> Table:
    """Gain, and what prefetch did: experts brought in ahead that were used, and for nothing, of those asked for."""
    found_gains, controls = gains(result), gains(result, "control")
    rows = []
    for row, found in result["rows"].items():
        for work, runs in found["works"].items():
            name, on = f"{row}, {work}", runs["on"]
            rows.append([
                name,
                str(found_gains[name]),
                str(controls[name]),
                f"{median(one['hits'] / one['asked'] for one in runs['off']):.1%}",
                f"{median(one['hits'] / one['asked'] for one in on):.1%}",
                f"{median(one['prefetch_used'] / one['asked'] for one in on):.1%}",
                f"{median(one['prefetch_wasted'] / one['asked'] for one in on):.1%}",
            ])  # fmt: skip
    header = ["row", "faster by", "control", "hits without", "hits", "used", "wasted"]
    return Table(f"With prefetch (medians of rounds, and where they lie with {SURE:.0%})", header, rows)


def verdict(result: dict[str, Any]) -> Verdict:
    """The worst row decides: it is slower if all of its interval is, and not if its median is not."""
    found = gains(result)
    if not found:
        return "prefetch: rows missing", None
    worst = min(found, key=lambda row: found[row].typical)
    promise = f"prefetch makes no row more than {SLOWER:.0%} slower; the worst is {worst}: {found[worst]}"
    shown = [gain for gain in found.values() if gain.most < 1 - SLOWER]
    return promise, False if shown else True if found[worst].typical >= 1 - SLOWER else None


if __name__ == "__main__":
    typer.run(measure_prefetch)
