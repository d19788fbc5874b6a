"""Assisted generation with experts on disk: when does it pay?

    python -m benchmarks.decode.speculative          # the small trained model, and the same with large experts
    python -m benchmarks.decode.speculative --quick  # every line of it once, figures without meaning

Drafts come from the text so far (prompt lookup), from a dense model, and from the model itself with its experts in two
bits, all of them resident; these take a part of the memory, and the rest is left to the cache. Experts are read past
the page cache, as where RAM is short. The model with large experts computes what the small one does
(`harness/widened.py`): its text and routing are real, and reading takes most of its time.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks import MADE, RESULTS, TINY_MOE
from benchmarks.harness.outcome import show, write
from benchmarks.harness.series import measured_rows
from benchmarks.harness.widened import widened
from benchmarks.quality.held_out import load_text
from transformers_moe_offload.bench.tables import Table, mib

PERCENTS = (10, 25, 50)

TIMES = 16
"""How much larger the large experts are: 1.7 MiB each."""

PREDICTED = (
    "loads a token with a draft in 2 bits within the budget: greedy about 12 and 8.5 at 25 % (5 and 10 drafted), 8 and "
    "6.4 at 50 %, where plain generation has 21 and 10; sampled about 16 at 25 %, where it has 20"
)
"""Written down before anything was measured within the budget, from loads of the small model beside it."""


def measure(
    quick: Annotated[bool, typer.Option("--quick", help="One residency, few tokens, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each way and prompt.")] = 3,
    most_minutes: Annotated[float, typer.Option(help="Begin no row after so long; run again to go on.")] = math.inf,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    text: Annotated[Path | None, typer.Option(help="A texts.json of examples/models/corpus.py.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure both models, greedy and sampled, at each residency."""
    made.mkdir(parents=True, exist_ok=True)
    prompt_tokens, new_tokens, rounds = (16, 32, 1) if quick else (128, 64, rounds)
    windows = load_text(text, held_out=1, trained=1, length=prompt_tokens)
    models = {"tiny-moe": (TINY_MOE, 32), "large experts": (widened(TINY_MOE, 2 if quick else TIMES, made), 64)}
    jobs = {
        f"{name}, {'sampled' if samples else 'greedy'}, {percent}%": {
            "folder": str(folder),
            "group_size": group_size,
            "percent": percent,
            "samples": samples,
            "prompts": windows.held_out.tolist(),
            "new_tokens": new_tokens,
            "rounds": rounds,
        }
        for (name, (folder, group_size)), samples, percent in product(
            models.items(), (False, True), PERCENTS[1:2] if quick else PERCENTS
        )
    }
    result = measured_rows(
        "benchmarks.decode.speculative_row:measure_speculative",
        jobs,
        TINY_MOE,
        threads,
        parts=made / "parts",
        most_s=60 * most_minutes,
    )
    result["facts"] = {
        "protocol": f"{new_tokens} tokens after each of {len(windows.held_out)} prompts of {prompt_tokens}, held-out "
        f"text, {windows.origin}; {rounds} rounds, each from an empty cache; measured from the first token on; experts "
        f"are read past the page cache",
        "sampled": "temperature 1, all tokens; drafts are accepted by speculative sampling",
        "predicted": PREDICTED,
    } | {row: _sizes(found) for row, found in result["rows"].items()}
    show(write(results, "speculative", result), result, tables(result), [])
    raise typer.Exit(1 if result["failed"] else 0)


def _sizes(found: dict[str, Any]) -> str:
    model = found["model"]
    return (
        f"{model['experts']} experts of {mib(model['expert_bytes'] / model['experts'])} MiB; all take "
        f"{mib(model['expert_bytes'])} MiB, in 2 bits {mib(found['draft_bytes'])} MiB; the dense draft "
        f"{mib(found['dense_bytes'])} MiB"
    )


def tables(result: dict[str, Any]) -> list[Table]:
    """One for each row: what each way drafts, reads and takes."""
    header = [
        "drafts from", "tokens/s", "min to max", "times plain", "accepted", "tokens a forward", "asked a token",
        "loads a token", "MiB a token", "texts as plain",
    ]  # fmt: skip
    return [
        Table(row, header, [_line(name, found["runs"], "greedy" in row) for name in found["runs"]])
        for row, found in result["rows"].items()
    ]


def _line(name: str, of_all: dict[str, list[dict[str, Any]]], is_greedy: bool) -> list[str]:
    runs, plain = of_all[name], of_all["plain"]
    tokens, forwards = _sum(runs, "tokens"), _sum(runs, "forwards")
    drafted = _sum(runs, "rows") - forwards
    speeds = sorted(one["tokens"] / one["seconds"] for one in runs)
    ratios = [
        (one["tokens"] / one["seconds"]) / (other["tokens"] / other["seconds"])
        for one, other in zip(runs, plain, strict=True)
    ]
    same = sum(one["text"] == other["text"] for one, other in zip(runs, plain, strict=True))
    return [
        name,
        f"{median(speeds):.1f}",
        f"{speeds[0]:.1f} to {speeds[-1]:.1f}",
        f"{median(ratios):.2f}",
        f"{(tokens - forwards) / drafted:.0%}" if drafted else "",
        f"{tokens / forwards:.2f}",
        f"{_sum(runs, 'asked') / tokens:.1f}",
        f"{_sum(runs, 'misses') / tokens:.1f}",
        mib(_sum(runs, "disk_bytes") / tokens),
        f"{same} of {len(runs)}" if is_greedy else "",
    ]


def _sum(runs: list[dict[str, Any]], count: str) -> int:
    return sum(one[count] for one in runs)


if __name__ == "__main__":
    typer.run(measure)
