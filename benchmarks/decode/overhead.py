"""What does a sparse layer cost beyond its arithmetic, with every expert that it wants resident?

    python -m benchmarks.decode.overhead          # the small trained model, and one shaped like OLMoE
    python -m benchmarks.decode.overhead --quick  # every line of it once, figures without meaning

The layers of a model take turns, so that each finds the processor's caches full of other layers' weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoModelForCausalLM

from benchmarks import MADE, RESULTS, TINY_MOE
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.series import compared_models, measured_rows
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.dispatch import dispatch
from transformers_moe_offload.bench.passage import passage_for
from transformers_moe_offload.bench.session import facts
from transformers_moe_offload.bench.tables import Table

PERCENTS = (50, 100)
"""Of the experts that have slots; a step's are resident with either."""

MOST_US = 150.0
"""Beyond the arithmetic, a sparse layer at batch 1."""

NO_SLOWER = 1.05
"""With the larger cache, times as long: what two measurements of the same thing differ by."""


def measure_overhead(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, few passes.")] = False,
    passes: Annotated[int, typer.Option(min=1, help="Times that every layer is taken apart.")] = 100,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure both models, mapped and copied."""
    jobs = {
        f"{name}, {'copied' if is_copied else 'mapped'}": {
            "folder": str(folder),
            "is_copied": is_copied,
            "percents": PERCENTS,
            "passes": 3 if quick else passes,
        }
        for name, folder in compared_models(quick, made).items()
        for is_copied in (False, True)
    }
    result = measured_rows("benchmarks.decode.overhead:measure_layers", jobs, TINY_MOE, threads)
    result["facts"] = {
        row: f"{found['model']['sparse_layers']} sparse layers, {found['model']['experts']} experts, "
        f"{found['model']['expert_bytes'] / found['model']['experts'] / 2**20:.2f} MiB each, "
        f"{found['model']['dtype']}; a step after 15 tokens of {found['passage']}, {found['passes']} passes"
        for row, found in result["rows"].items()
    }
    show(write(results, "overhead", result), result, [table(result)], verdicts(result))
    raise typer.Exit(1 if result["failed"] else 0)


def measure_layers(folder: str, is_copied: bool, percents: list[int], passes: int) -> dict[str, Any]:
    """The sparse layers of one model, taken apart by `bench.dispatch.dispatch`, by percent of experts with slots."""
    # A cache that holds everything is made of copies, and stays so when its budget changes; a smaller one is mapped.
    config = OffloadConfig(cache_budget=f"{percents[0]}%", mmap=False if is_copied else "auto")
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
    passage = passage_for(model, folder)
    answer: dict[str, Any] = {"model": facts(model), "passage": passage.source, "passes": passes, "dispatch": {}}
    for percent in percents:
        model.moe_offload.resize(f"{percent}%")
        answer["dispatch"][str(percent)] = dispatch(model, passage.sequences(1, 16), passes)
    return answer


PARTS = ("whole", "arithmetic", "overhead", "grouping", "visit", "combine", "rest")


def table(result: dict[str, Any]) -> Table:
    """Each part, by model and cache."""
    rows = [
        [f"{row}, {percent}%", f"{one['resident_share']:.0%}", *(_us(one["us_per_layer"][part]) for part in PARTS)]
        for row, found in result["rows"].items()
        for percent, one in found["dispatch"].items()
    ]
    return Table("One sparse layer at batch 1, in microseconds", ["row", "resident", *PARTS], rows)


def _us(value: float | None) -> str:
    """A part that there is not where one call computes the layer is empty."""
    return "" if value is None else f"{value:.1f}"


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """What is promised, for each row."""
    found: list[Verdict] = []
    for row, measured in result["rows"].items():
        smaller, larger = (measured["dispatch"][str(percent)]["us_per_layer"] for percent in PERCENTS)
        us = max(smaller["overhead"], larger["overhead"])
        found.append((f"{row}: at most {MOST_US:g} us beyond the arithmetic: {us:.0f}", us <= MOST_US))
        times = larger["whole"] / smaller["whole"]
        promise = f"{row}: no slower with {PERCENTS[1]}% than with {PERCENTS[0]}%: {times:.2f} times"
        found.append((promise, times <= NO_SLOWER))
    return found


if __name__ == "__main__":
    typer.run(measure_overhead)
