"""`moe-offload tradeoff`: what cache-aware routing costs and gains, and the strength to use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.layers import files_of, store_of
from transformers_moe_offload.bench.page_cache import can_drop, drop
from transformers_moe_offload.bench.session import unmap_dense
from transformers_moe_offload.bench.tables import Table, mib, show
from transformers_moe_offload.cli import options
from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.cli.writing import expect_file, write_json
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.routing.meter import Interval, Tradeoff
from transformers_moe_offload.routing.meter.measurement import tradeoff as measure
from transformers_moe_offload.routing.meter.picture import draw, expect_picture, save
from transformers_moe_offload.untrusted import quoted, reading


def tradeoff(
    model: str,
    text: list[Path],
    strengths: str,
    protect: int,
    max_loss: str,
    tokens: int,
    window: int,
    cold: bool,
    resume: Path | None,
    json_file: Path | None,
    picture: Path | None,
    cache_budget: str,
    policy: str,
    arithmetic: str,
    mmap: bool | None,
    **typed: Unpack[options.Loading],
) -> None:
    """Measure each strength, and print the figures, the recommended strength and the line of code for it."""
    config = OffloadConfig(
        cache_budget=cache_budget,
        policy=policy,
        arithmetic=arithmetic,  # type: ignore[arg-type]
        mmap="auto" if mmap is None else mmap,
    )
    asked, most = numbers_in("--strengths", strengths), share_in("--max-loss", max_loss)
    if cold and not can_drop():
        raise CommandError("--cold needs Linux, which can be asked to drop files from the page cache")
    for option, file in (("--json", json_file), ("--picture", picture), ("--resume", resume)):
        expect_file(option, file)
    if picture is not None:
        expect_picture(picture)
    origin, loading = options.parse_loading(typed)
    written = [read_text(path) for path in text]
    tokenizer = options.load_tokenizer(model, **origin)
    ids = [tokens_of(tokenizer, path, content) for path, content in zip(text, written, strict=True)]
    with options.loaded(model, config, **loading) as offloaded, _progress(resume) as report:
        if cold:
            unmap_dense(offloaded)
        files = files_of(store_of(offloaded))
        found = measure(
            offloaded,
            ids,
            asked,
            protect=protect,
            max_loss=most,
            tokens=tokens,
            window=window,
            resume=resume,
            before_step=(lambda: drop(files)) if cold else lambda: None,
            progress=report,
        )
        about = {"model": model, "cold": cold, "conditions": conditions(files[0])}
    _show(found)
    if picture is not None:
        save(draw(found), picture)
    write_json(json_file, about | found.to_dict())


def numbers_in(option: str, text: str) -> list[float]:
    """The numbers in `0.1,0.2`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise CommandError(f"{option} {quoted(text)} is not a list of numbers such as 0.1,0.2,0.4") from None


def share_in(option: str, text: str) -> float:
    """The share in `1%`, or a number."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", text.strip())
    if match is None:
        raise CommandError(f"{option} {quoted(text)} is not a share of the perplexity such as 1%")
    return float(match[1]) / (100 if match[2] else 1)


def read_text(path: Path) -> str:
    """A text in UTF-8."""
    with reading(f"cannot read --text {path}"):
        return path.read_text(encoding="utf-8")


def tokens_of(tokenizer: Any, path: Path, text: str) -> list[int]:
    """A text as the model's tokenizer splits it; raises `CommandError` for fewer than two tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise CommandError(
            f"--text {path} has {len(ids)} token{'s' * (len(ids) != 1)}, and nothing to predict in fewer than 2; name "
            f"a longer text"
        )
    return ids


@contextmanager
def _progress(resume: Path | None) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; after Ctrl-C a line that says how to go on."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("steps", total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        except KeyboardInterrupt:
            bar.stop()
            how = "; run the same command again to go on" if resume is not None else "; with --resume FILE it is kept"
            typer.echo(f"interrupted{how}", err=True)
            raise


HEADER = ["strength", "hit rate", "misses", "MiB a token", "tokens/s", "speed", "perplexity", "KL, nats", "same token"]


def _show(found: Tradeoff) -> None:
    rows = [
        [
            f"{one.strength:g}",
            _percent(one.hit_rate),
            _percent(one.misses),
            mib(one.bytes_per_token.value),
            _plus_minus(one.tokens_per_s, "{:.1f}"),
            _plus_minus(one.speed, "{:.2f}") + " times",
            f"{100 * one.loss.low:+.1f} to {100 * one.loss.high:+.1f} %",
            _plus_minus(one.kl, "{:.4f}"),
            _percent(one.agreement),
        ]
        for one in found.figures
    ]
    console, best = Console(), found.recommended
    title = f"{found.num_tokens} tokens at each strength, step by step (misses, speed, perplexity: beside strength 0)"
    show(console, Table(title, HEADER, rows))
    if best.strength:
        said = (
            f"recommended: strength {best.strength:g}, the largest within {100 * found.max_loss:g} % of perplexity: "
            f"{_signed(best.loss)}, {100 * best.misses.value:.0f} % of the misses, "
            f"{best.speed.value:.2f} times the speed"
        )
    else:
        said = f"recommended: none of these strengths; all lose more than {100 * found.max_loss:g} % of perplexity"
    for line in (said, found.line):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _signed(loss: Interval) -> str:
    return f"{100 * loss.value:+.2f} % ({100 * loss.low:+.2f} to {100 * loss.high:+.2f} %)"


def _percent(found: Interval) -> str:
    return _plus_minus(Interval(*(100 * one for one in found)), "{:.1f}") + " %"


def _plus_minus(found: Interval, form: str) -> str:
    """A figure and half of its interval."""
    return f"{form.format(found.value)} ± {form.format((found.high - found.low) / 2)}"
