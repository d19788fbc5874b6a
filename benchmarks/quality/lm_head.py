"""What the output embedding in few bits costs: held-out perplexity with a head of 16, 8, 4, 3 and 2 bits.

    python -m benchmarks.quality.lm_head          # the small trained model, about 3 minutes
    python -m benchmarks.quality.lm_head --quick  # every line of it once, figures without meaning

The head of the small trained model shares its matrix with the input embedding, and such a head cannot be quantized. So
a copy is measured whose head is a matrix of its own with the same weights: with 16 bits it is the same model.
Everything else is as in `quality.py`.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks import RESULTS, TINY_MOE
from benchmarks.harness.outcome import show, write
from benchmarks.quality.held_out import LENGTH, load_text
from benchmarks.quality.measurement import FOUR_BITS, PLAIN, Measurement, Recipe
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table, mib

HEADS = (PLAIN, "8x64", "4x64", "3x64", "2x64")
BESIDE = ((PLAIN, PLAIN), ("4x64", FOUR_BITS))
"""Formats of attention and of experts that each head is measured beside."""


def measure_heads(
    quick: Annotated[bool, typer.Option("--quick", help="One short window of each domain.")] = False,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 held-out tokens of each domain.")] = 40,
    text: Annotated[
        Path | None, typer.Option(help="A texts.json of examples/models/corpus.py; default is to collect it anew.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads torch may use.")] = 1,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure every format of the head, beside experts and attention in 16 and in 4 bits."""
    torch.set_num_threads(threads)
    where = conditions(TINY_MOE, threads)
    counts = (1, 1, 128) if quick else (windows, 1, LENGTH)
    found = load_text(text, held_out=counts[0], trained=counts[1], length=counts[2])
    with TemporaryDirectory() as folder:
        measurement = Measurement(found, untied(Path(folder)))
        rows = [measurement.row(recipe) for recipe in recipes(measurement)]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": where,
        "facts": {
            "torch threads": str(threads),
            "model": "examples/models/tiny-moe, its head a matrix of its own, computed in float32",
            "formats": "bits x group size, 8-bit scales and zeros (meta_nbits=8), hqq's solver; MiB: as stored",
            "held-out text": f"{found.held_out[:, 1:].numel()} tokens predicted, {found.origin}",
            "±": "standard error of the difference, over windows",
        },
        "rows": rows,
    }
    show(write(results, "lm-head", result), result, [table(result)], [])


def untied(folder: Path) -> Path:
    """Write a copy of the small trained model with the input embedding's weights in a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE)
    config = model.config
    config.tie_word_embeddings = False
    copy = type(model)(config).to(model.dtype)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)
    return folder


def recipes(measurement: Measurement) -> list[Recipe]:
    """Every head beside each of the other formats."""
    return [
        replace(measurement.uniform(experts, attention), lm_head=head)
        for attention, experts in BESIDE
        for head in HEADS
    ]


def table(result: dict[str, Any]) -> Table:
    """A row for each head; what it costs is over the same formats with a head of 16 bits."""
    plain = {
        (row["attention"], row["experts"]): row["perplexity"]["all"]
        for row in result["rows"]
        if row["lm_head"] == PLAIN
    }
    domains = list(result["rows"][0]["perplexity"])
    rows = []
    for row in result["rows"]:
        over = row["perplexity"]["all"] / plain[row["attention"], row["experts"]] - 1
        rows.append(
            [
                f"{row['attention']} / {row['experts']} / {row['lm_head']}",
                mib(row["bytes"]),
                *(f"{row['perplexity'][domain]:.3f}" for domain in domains),
                f"{over:+.2%}",
                f"{row['over_plain']['ratio'] - 1:+.2%} ± {100 * row['over_plain']['standard_error']:.2f}",
            ]
        )
    return Table(
        "Held-out perplexity by formats of attention, experts and head",
        ["attention / experts / head", "MiB", *domains, "over a head of 16 bits", "over 16-bit"],
        rows,
    )


if __name__ == "__main__":
    logging.disable_progress_bar()
    typer.run(measure_heads)
