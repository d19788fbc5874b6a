"""How close is the speed that `moe-offload tune` predicts to the speed that it measures?

    python -m benchmarks.decode.tuned          # about six minutes; makes a model of 0.8 GiB
    python -m benchmarks.decode.tuned --quick  # every line of it once, figures without meaning

The small trained model at three sizes of RAM, the same quantized on disk, and a made model whose experts of 4.5 MiB
take longer to read than to compute. Expected, written down before the first run: within 15 % for the recommended
setting of every row, and within 25 % for every setting that is run; prefetching is the hardest to predict, because it
watches the clock itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import CHECKOUT, MADE, RESULTS, TINY_MOE
from benchmarks.harness import shape as shapes
from benchmarks.harness.make_model import made_model
from benchmarks.harness.outcome import Verdict, show, write
from transformers_moe_offload import HqqFormat, OffloadConfig, quantize_checkpoint
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.passage import random_passage
from transformers_moe_offload.bench.tables import Table
from transformers_moe_offload.tuning import Tuned, tune
from transformers_moe_offload.tuning.settings import WITHIN

LARGE = shapes.Shape(layers=6)
"""0.8 GiB of experts, 4.5 MiB each."""

WITHIN_ANY = 0.25
"""Share by which the prediction of any setting that is run may be off."""


def measure_tuned(
    quick: Annotated[bool, typer.Option("--quick", help="Try every line once, with next to no text.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 1,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Tune each model, and compare what was predicted with what was measured."""
    torch.set_num_threads(threads)
    where = conditions(TINY_MOE, threads)
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder, texts, ram, options in _rows(Path(scratch), made, quick):
            typer.echo(f"tuning {name}", err=True)
            found = tune(partial(_load, folder), texts, ram=ram, **options)
            rows[name] = found.to_dict() | {"checked": [one.to_dict() for one in found.checked]}
            typer.echo(_said(found), err=True)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": where,
        "rows": rows,
        "facts": {
            "tiny-moe": "examples/models/tiny-moe, 8 layers of 16 experts, 108 KiB each, 4 a token; text: README.md",
            "made": f"random weights, {LARGE.layers} layers of {LARGE.experts} experts, "
            f"{LARGE.expert_bytes / 2**20:.1f} MiB each, {LARGE.experts_per_token} a token; text: random tokens",
            "speeds": "tokens/s, token by token, experts not in the page cache; the median of three runs for each step",
        },
    }
    show(write(results, "tuned", result), result, [table(result)], verdicts(result))


def _load(folder: Path, config: OffloadConfig) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, moe_offload=config)


_Row = tuple[str, Path, Sequence[Sequence[int]], str, dict[str, Any]]
"""Name, folder, texts, RAM for experts, and options of `tune`."""


def _rows(scratch: Path, made: Path, quick: bool) -> Iterator[_Row]:
    ids = AutoTokenizer.from_pretrained(TINY_MOE)((CHECKOUT / "README.md").read_text(), verbose=False)["input_ids"]
    few = {"tokens": 24, "window": 13, "policies": ["lru"], "predictors": ["next_router"]} if quick else {}
    for ram in ("4MiB",) if quick else ("2MiB", "4MiB", "8MiB"):
        yield f"tiny-moe, {ram}", TINY_MOE, [ids], ram, few
    folder = scratch / "tiny-moe-4x32"
    quantize_checkpoint(TINY_MOE, folder, experts=HqqFormat(nbits=4, group_size=32))
    yield "tiny-moe in 4 bits, 1MiB", folder, [ids], "1MiB", few | {"formats": []}
    shape = shapes.QUICK if quick else LARGE
    tokens = random_passage(shape.vocab).tokens[: 25 if quick else 129]
    ram = "100kB" if quick else "216MiB"
    of_made = {"tokens": 128, "window": 129, "formats": [], "strengths": []} | few
    yield f"made, {ram}", made_model(shape, made), [tokens.tolist()], ram, of_made


def _said(found: Tuned) -> str:
    return f"{found.line}: {found.best.predicted.tokens_per_s:.1f} predicted, {found.best.measured_tokens_per_s:.1f}"


HEADER = ["model and RAM", "setting", "hit rate", "predicted", "measured", "off by", "other programs, cores"]


def table(result: dict[str, Any]) -> Table:
    """A row for each setting that was run, the recommended ones with a star."""
    rows = [
        [
            name,
            one["line"] + (" *" if one["line"] == row["line"] else ""),
            f"{one['hit_rate']:.1%}",
            f"{one['predicted_tokens_per_s']:.1f}",
            f"{one['measured_tokens_per_s']:.1f}",
            f"{one['error']:+.1%}",
            f"{max(one['other_cores'], row['other_cores']):.2f}",
        ]
        for name, row in result["rows"].items()
        for one in row["checked"]
    ]
    return Table("Settings that were run, tokens/s; * recommended", HEADER, rows)


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """What was expected of recommended settings, and of all that were run."""
    chosen = {
        name: row["predicted_tokens_per_s"] / row["measured_tokens_per_s"] - 1 for name, row in result["rows"].items()
    }
    worst = max(chosen, key=lambda name: abs(chosen[name]))
    errors = [one["error"] for row in result["rows"].values() for one in row["checked"]]
    furthest = max(errors, key=abs)
    return [
        (
            f"within {WITHIN:.0%} for the recommended settings: {chosen[worst]:+.1%} at most ({worst})",
            abs(chosen[worst]) <= WITHIN,
        ),
        (f"within {WITHIN_ANY:.0%} for all that were run: {furthest:+.1%} at most", abs(furthest) <= WITHIN_ANY),
    ]


if __name__ == "__main__":
    typer.run(measure_tuned)
