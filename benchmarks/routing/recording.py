"""What does it cost to record routing while a model decodes?

    python -m benchmarks.routing.recording          # the small trained model, about a minute
    python -m benchmarks.routing.recording --quick  # every line of it once, figures without meaning

Its layers cost next to nothing, so the share is the largest there is. Both ways take turns in one process.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks import CHECKOUT, RESULTS, TINY_MOE
from benchmarks.harness.outcome import Verdict, show, write
from transformers_moe_offload import routing
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table

ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offloaded, all experts resident": {"moe_offload": {"cache_budget": "100%", "mmap": False}},
    "offloaded, half of the experts": {"moe_offload": {"cache_budget": "50%", "mmap": False}},
}
"""How the model is loaded."""

MOST = 0.10
"""Of decode time."""

PROMPT = 16


def measure_recording(
    quick: Annotated[bool, typer.Option("--quick", help="A few tokens, two rounds.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row, with and without a recording.")] = 15,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure decoding in one thread, recorded to disk and not."""
    torch.set_num_threads(1)
    where = conditions(TINY_MOE, num_threads=1)
    steps, rounds = (4, 2) if quick else (64, rounds)
    text = Path(CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
    prompt = AutoTokenizer.from_pretrained(TINY_MOE)(text, return_tensors="pt").input_ids[:, :PROMPT]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": where,
        "facts": {
            "model": "examples/models/tiny-moe, bfloat16: 8 sparse layers of 16 experts, 4 for each token",
            "run": f"{steps} tokens after {PROMPT}, one thread; the prompt is a part of it",
            "recording": "scores of all experts in float16, experts, weights and tokens, to a new folder",
            "rounds": f"{rounds}, with and without a recording in turns, after one of each that does not count",
            "more": "median over the rounds of the ratio of two neighbours",
        },
        "rows": {name: measured_row(options, prompt, steps, rounds) for name, options in ROWS.items()},
    }
    show(write(results, "recording", result), result, [table(result)], verdicts(result))


def measured_row(options: dict[str, Any], prompt: torch.Tensor, steps: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a token of every run: of the processor and by the clock, without and with a recording."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, **options).eval()
    found: dict[str, list[float]] = {f"{clock}_{way}": [] for clock in ("cpu", "wall") for way in ("off", "on")}
    for number in range(rounds + 1):
        for way in ("off", "on"):
            cpu, wall = _run(model, prompt, steps, is_recorded=way == "on")
            if number:
                found[f"cpu_{way}"].append(1e3 * cpu / steps)
                found[f"wall_{way}"].append(1e3 * wall / steps)
    return found


def _run(model: Any, prompt: torch.Tensor, steps: int, *, is_recorded: bool) -> tuple[float, float]:
    """Seconds of the processor and by the clock, with all that a recording writes."""
    with TemporaryDirectory() as folder:
        started = time.process_time(), time.perf_counter()
        if is_recorded:
            with routing.record_routing(model, folder):
                _decode(model, prompt, steps)
        else:
            _decode(model, prompt, steps)
        return time.process_time() - started[0], time.perf_counter() - started[1]


def _decode(model: Any, prompt: torch.Tensor, steps: int) -> None:
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
    )


def more(row: dict[str, list[float]], clock: str) -> float:
    """By what share a run takes longer when it is recorded."""
    return median(on / off for off, on in zip(row[f"{clock}_off"], row[f"{clock}_on"], strict=True)) - 1


def table(result: dict[str, Any]) -> Table:
    """A row for each way to load the model."""
    header = ["model", "ms a token", "recorded", "more", "by the clock", "recorded", "more"]
    rows = [
        [
            name,
            *(
                text
                for clock in ("cpu", "wall")
                for text in (
                    f"{median(row[f'{clock}_off']):.2f}",
                    f"{median(row[f'{clock}_on']):.2f}",
                    f"{more(row, clock):+.1%}",
                )
            ),
        ]
        for name, row in result["rows"].items()
    ]
    return Table("Decoding with and without a recording: time of the processor, and by the clock", header, rows)


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """The processor's time decides: it is what a recording takes."""
    found: list[Verdict] = []
    for name, row in result["rows"].items():
        share = more(row, "cpu")
        found.append((f"{name}: recording costs at most {MOST:.0%} of decode time: {share:+.1%}", share <= MOST))
    return found


if __name__ == "__main__":
    logging.disable_progress_bar()
    typer.run(measure_recording)
