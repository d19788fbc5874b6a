"""What does it cost to train routers for locality, and how many misses does it save?

    python -m benchmarks.training.locality          # about ten minutes; --most-minutes 3 in pieces
    python -m benchmarks.training.locality --quick  # every line of it once, figures without meaning

The small trained model is trained on with `RouterRegulariser(locality=...)`, and again without it, for as many steps of
the same text. Then held-out text is read token by token by the offloaded model with slots for 25 % of its experts,
which counts hits, and at once, which counts the loss.
"""

# N steps, B windows, S positions

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import save_file

from benchmarks import MADE, RESULTS, TINY_MOE
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.series import measured_rows
from benchmarks.quality.held_out import load_text
from transformers_moe_offload.bench.tables import Table

BATCH = 8
"""Windows of each step."""

BEFORE, WITHOUT, WITH = "as it comes", "routers", "routers, locality 1"

ROWS: dict[str, dict[str, Any]] = {
    BEFORE: {"is_trained": False},
    WITHOUT: {},
    "routers, locality 0.3": {"locality": 0.3},
    WITH: {"locality": 1.0},
    "routers, locality 1, of 4 tokens": {"locality": 1.0, "window": 4},
    "routers, locality 3": {"locality": 3.0},
}
"""What is trained, by the name it has in the table."""

MORE_HITS, MORE_NATS = 0.10, math.log(1.01)
PREDICTION = (
    f"routers alone, trained with locality 1, hit {MORE_HITS:.0%} of requests more than without, at a perplexity at "
    f"most 1 % higher; ReMoE says +15.7 % hits and no loss on tasks (arXiv 2605.27081)"
)
"""Made before any such training. The form of the loss was chosen after it, in trials on this model and other
windows."""


def measure_locality(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, two steps.")] = False,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each row.")] = 24,
    text: Annotated[Path | None, typer.Option(help="A texts.json of examples/models/corpus.py.")] = None,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    most_minutes: Annotated[float, typer.Option(help="Begin no row after so long; run again to go on.")] = math.inf,
    made: Annotated[Path, typer.Option(help="Where trained models are kept while they are measured.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Train the small model for locality in several strengths, and measure its cache and its loss."""
    steps, batch, length, stepwise = (2, 2, 32, 24) if quick else (steps, BATCH, 256, 256)
    windows = load_text(text, held_out=1 if quick else 16, trained=-(-steps * batch // 3), length=length)
    made.mkdir(parents=True, exist_ok=True)
    path = made / "windows-locality.safetensors"
    save_file({"trained": windows.trained.clone(), "held_out": windows.held_out.clone()}, path)
    own = {"folder": str(TINY_MOE), "text": str(path), "steps": steps, "batch": batch, "stepwise": stepwise}
    result = measured_rows(
        "benchmarks.training.locality_row:locality_row",
        {name: own | row for name, row in ROWS.items()},
        TINY_MOE,
        threads,
        parts=made / "parts",
        most_s=60 * most_minutes,
    )
    result["facts"] = {
        "training": f"{steps} steps of {batch} windows of {length} tokens that the model was trained on, AdamW, "
        "warm-up and cosine, computed in float32, learning rate 0.003; nothing but the routers is trained",
        "held-out text": f"{windows.held_out.numel():,} tokens read at once for the loss, {windows.origin}; of each "
        f"domain a window of {stepwise} tokens is read token by token for the cache, in bfloat16, as the experts are "
        "stored",
        "cache": "25 % of the experts, policy lru, no prefetch",
        "±": "standard error of the difference from the row without locality, over windows",
        "prediction": PREDICTION,
    }
    show(write(results, "locality", result), result, tables(result), [verdict(result)])
    raise typer.Exit(1 if result["failed"] else 0)


def tables(result: dict[str, Any]) -> list[Table]:
    """A row for each training."""
    rows = result["rows"]
    lines = []
    for name, row in rows.items():
        control = rows.get(WITHOUT, row)
        lines.append(
            [
                name,
                f"{row['hit_rate']:.1%}",
                f"{row['mib_per_token']:.2f}",
                f"{row['repeat_rate']:.1%}",
                f"{row['load_cv']:.2f}",
                f"{mean(row['losses']):.4f}",
                _rise(row, control) if "locality" in name else "",
                f"{row['stepwise_loss']:.3f}",
            ]
        )
    columns = [
        "what is trained",
        "hits",
        "MiB a token",
        "repeated",
        "load's variation",
        "loss",
        "over none",
        "step by step",
    ]
    return [Table("tiny-moe with 25 % of its experts resident (loss in nats per held-out token)", columns, lines)]


def verdict(result: dict[str, Any]) -> Verdict:
    """Whether the prediction came true."""
    rows = result["rows"]
    if WITH not in rows or WITHOUT not in rows:
        return PREDICTION, None
    row, control = rows[WITH], rows[WITHOUT]
    more, nats = row["hit_rate"] - control["hit_rate"], mean(row["losses"]) - mean(control["losses"])
    said = f"{PREDICTION}: {100 * more:+.1f} points, {100 * math.expm1(nats):+.2f} % perplexity"
    return said, more >= MORE_HITS and nats <= MORE_NATS


def mean(losses: list[float]) -> float:
    """Of windows of one length."""
    return sum(losses) / len(losses)


def _rise(row: dict[str, Any], control: dict[str, Any]) -> str:
    rises = [one - other for one, other in zip(row["losses"], control["losses"], strict=True)]
    error = (mean([rise**2 for rise in rises]) - mean(rises) ** 2) ** 0.5 / len(rises) ** 0.5
    return f"{mean(rises):+.4f} ± {error:.4f}"


if __name__ == "__main__":
    typer.run(measure_locality)
