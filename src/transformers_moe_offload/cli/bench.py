"""`moe-offload bench`: how fast a model is on this machine, and how much of the machine's limit that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from transformers_moe_offload.bench.conditions import described
from transformers_moe_offload.bench.kernels import QUICK as QUICK_KERNELS
from transformers_moe_offload.bench.kernels import KernelProtocol, kernel_tables, measure_kernels
from transformers_moe_offload.bench.passage import Passage, passage_for, text_passage
from transformers_moe_offload.bench.report import facts, tables
from transformers_moe_offload.bench.session import measure
from transformers_moe_offload.bench.tables import Table, show
from transformers_moe_offload.bench.workload import QUICK, Protocol
from transformers_moe_offload.cli import options
from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.cli.writing import expect_file, write_json
from transformers_moe_offload.config import OffloadConfig, PrefetchConfig
from transformers_moe_offload.hf.loading.meta_model import read_config
from transformers_moe_offload.untrusted import reading


def bench(
    model: str | None,
    cache_budget: str,
    policy: str,
    cache_aware: float | None,
    arithmetic: str,
    prefetch: str | None,
    mmap: bool | None,
    json_file: Path | None,
    quick: bool,
    kernels: bool,
    text: Path | None,
    **typed: Unpack[options.Loading],
) -> None:
    """Measure a model, or products of matrices, and print the figures."""
    if (model is None) != kernels:
        raise CommandError("bench measures a MODEL or, with --kernels, products of matrices: give one of the two")
    expect_file("--json", json_file)
    if model is None:
        with _progress() as begin:
            result = measure_kernels(QUICK_KERNELS if quick else KernelProtocol(), begin)
        _show(described(result["conditions"]) | result["kernels"], kernel_tables(result))
    else:
        config = OffloadConfig(
            cache_budget=cache_budget,
            policy=policy,
            cache_aware=cache_aware,  # type: ignore[arg-type]
            arithmetic=arithmetic,  # type: ignore[arg-type]
            prefetch=None if prefetch is None else PrefetchConfig(predictor=prefetch),
            mmap="auto" if mmap is None else mmap,
        )
        origin, loading = options.parse_loading(typed)
        with reading(f"cannot read --text {text}"):
            written = None if text is None else text.read_text(encoding="utf-8")
        read_config(model, f"cannot load {model!r}", **origin)
        with options.loaded(model, config, **loading) as offloaded, _progress() as begin:
            passage = _passage(model, offloaded, written, origin, text)
            result = measure(offloaded.eval(), passage, QUICK if quick else Protocol(), begin)
        _show(facts(result), tables(result), result["notes"])
    write_json(json_file, result)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda what: progress.update(task, description=what)


def _passage(name: str, model: Any, text: str | None, origin: options.Origin, path: Path | None) -> Passage:
    """The user's text, or the default of `passage_for`."""
    if text is None:
        return passage_for(model, name, **origin)
    with reading(f"--text needs a tokenizer, which cannot be read from {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name, **origin)
    return text_passage(tokenizer, text, str(path))


def _show(about: Mapping[str, object], figures: Iterable[Table], notes: Iterable[str] = ()) -> None:
    console = Console()
    for name, value in about.items():
        console.print(f"{name}: {value}", soft_wrap=True, markup=False, highlight=False)
    console.print()
    for table in figures:
        show(console, table)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
