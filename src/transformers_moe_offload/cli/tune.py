"""`moe-offload tune`: the settings with which a model decodes fastest in so much RAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM

from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.passage import passage_for
from transformers_moe_offload.bench.tables import Table, show
from transformers_moe_offload.cli import options
from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.cli.replay import visits_of
from transformers_moe_offload.cli.tradeoff import numbers_in, read_text, share_in, tokens_of
from transformers_moe_offload.cli.writing import expect_file, write_json
from transformers_moe_offload.config import HqqFormat, OffloadConfig
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.tuning import Candidate, Tuned
from transformers_moe_offload.tuning import tune as search
from transformers_moe_offload.tuning.limits import checked_ram, expect_same_layers
from transformers_moe_offload.tuning.settings import WITHIN
from transformers_moe_offload.untrusted import reading

SHOWN = 12
"""Rows of the table; all are in the JSON."""


def tune(
    model: str,
    ram: str,
    text: list[Path] | None,
    trace: Path | None,
    policy: list[str] | None,
    predictor: list[str] | None,
    formats: str,
    strengths: str,
    max_loss: str,
    tokens: int,
    window: int,
    json_file: Path | None,
    arithmetic: str,
    dtype: str,
    **origin: Unpack[options.Origin],
) -> None:
    """Print what was predicted and measured, the recommended line of code, and whether the prediction held."""
    if (not text) == (trace is None):
        raise CommandError("give what to tune for either with --text FILE, as often as you like, or with --trace TRACE")
    expect_file("--json", json_file)
    checked_ram(ram)
    asked = [] if formats == "none" else [HqqFormat.parse(part) for part in formats.split(",")]
    strong = [] if strengths == "none" else numbers_in("--strengths", strengths)
    most = share_in("--max-loss", max_loss)
    written = [read_text(path) for path in text or ()]
    recorded = None if trace is None else visits_of(trace)[0]
    source = meta_model(model, options.parse_dtype(dtype), **origin)
    if recorded is not None:
        expect_same_layers(recorded, [(spec.name, spec.num_experts) for spec in source.experts], model)
    if source.recipe is not None or source.opener is not None:
        asked = []  # they have a format already
    if text:
        tokenizer = options.load_tokenizer(model, **origin)
        ids = [tokens_of(tokenizer, path, content) for path, content in zip(text, written, strict=True)]
    else:
        ids = [passage_for(source.model, model, **origin).tokens.tolist()]

    def load(config: OffloadConfig) -> Any:
        with reading(f"cannot load {model!r}"):
            return AutoModelForCausalLM.from_pretrained(
                model, moe_offload=config, dtype=options.parse_dtype(dtype) or "auto", **origin
            )

    with _progress() as report:
        found = search(
            load,
            ids,
            ram=ram,
            trace=recorded,
            policies=policy,
            predictors=predictor,
            formats=asked,
            strengths=strong,
            max_loss=most,
            tokens=tokens,
            window=window,
            arithmetic=arithmetic,
            progress=report,
        )
    _show(found, is_traced=recorded is not None)
    folder = Path(model) if Path(model).is_dir() else None
    write_json(json_file, {"model": model, "conditions": conditions(folder)} | found.to_dict())


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr that says what is being done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


HEADER = [
    "slots",
    "policy",
    "prefetch",
    "format",
    "strength",
    "hit rate",
    "perplexity",
    "predicted",
    "measured",
    "off by",
]


def rows_of(found: Tuned) -> list[list[str]]:
    """A row for each of the best candidates, and for all that were run."""
    shown = [one for place, one in enumerate(found.candidates) if place < SHOWN or one.measured]
    return [_row(one) for one in shown]


def _row(one: Candidate) -> list[str]:
    setting, measured, error = one.setting, one.measured_tokens_per_s, one.error
    return [
        str(one.num_slots),
        setting.config.policy,
        setting.prefetch,
        setting.format,
        f"{setting.strength:g}",
        f"{one.ranked.hit_rate:.1%}",
        "as it is" if setting.loss is None else f"{100 * setting.loss.value:+.2f} %",
        f"{one.ranked.tokens_per_s:.1f}",
        "" if measured is None else f"{measured:.1f}",
        "" if error is None else f"{100 * error:+.1f} %",
    ]


def verdict_of(found: Tuned) -> str:
    """The recommended setting's speeds, and whether the prediction held."""
    best = found.best
    assert best.measured is not None, "it was run"
    error, runs = best.error or 0.0, best.measured.runs
    held = "within" if found.is_within else "NOT within"
    said = (
        f"recommended: {best.measured.tokens_per_s:.1f} tokens/s measured, {best.predicted.tokens_per_s:.1f} predicted "
        f"({100 * error:+.1f} %, {held} {100 * WITHIN:.0f} %)"
    )
    if found.disturbed_by:
        said += (
            f"; other programs kept {found.disturbed_by:.1f} cores busy meanwhile, and runs were at {min(runs):.1f} to "
            f"{max(runs):.1f}: leave the machine alone, and run it again"
        )
    return said


def loss_of(found: Tuned) -> str | None:
    """What the recommended setting changes, and the fastest that was run and changes nothing; None if it is that."""
    loss = found.best.setting.loss
    if loss is None:
        return None
    own = max(
        (one for one in found.checked if one.setting.loss is None), key=lambda one: one.measured_tokens_per_s or 0
    )
    return (
        f"it changes results: perplexity {100 * loss.value:+.2f} % ({100 * loss.low:+.2f} to {100 * loss.high:+.2f} %)"
        f"; without that: {own.measured_tokens_per_s:.1f} tokens/s, {own.setting.line}"
    )


def _show(found: Tuned, *, is_traced: bool) -> None:
    console = Console()
    what = "the trace; off by: on the text that was run" if is_traced else f"{found.tokens} tokens of text"
    title = f"tokens/s in {found.ram_bytes:,} bytes of experts, predicted on {what}"
    show(console, Table(title, HEADER, rows_of(found)))
    loss = loss_of(found)
    lines = [*(f"note: {note}" for note in found.notes), verdict_of(found), *([loss] if loss else []), found.line]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
