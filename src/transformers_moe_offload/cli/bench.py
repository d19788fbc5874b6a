"""`moe-offload bench`: how fast a model is on this machine, and how much of the machine's limit that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from transformers_moe_offload.bench.conditions import described
from transformers_moe_offload.bench.kernels import QUICK as QUICK_KERNELS
from transformers_moe_offload.bench.kernels import KernelProtocol, kernel_tables, measure_kernels
from transformers_moe_offload.bench.passage import Passage, passage_for, text_passage
from transformers_moe_offload.bench.protocol import QUICK, Protocol
from transformers_moe_offload.bench.report import facts, tables
from transformers_moe_offload.bench.session import measure
from transformers_moe_offload.bench.tables import show
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
    arithmetic: str,
    prefetch: str | None,
    mmap: bool | None,
    json_file: Path | None,
    quick: bool,
    kernels: bool,
    text: Path | None,
    dtype: str,
    device_map: str | None,
    revision: str,
    token: str | None,
    local_files_only: bool,
    trust_remote_code: bool,
) -> None:
    """Measure a model, or products of matrices, and print the figures."""
    if (model is None) != kernels:
        raise CommandError("bench measures a MODEL or, with --kernels, products of matrices: give one of the two")
    if model is None:
        _bench_kernels(json_file, QUICK_KERNELS if quick else KernelProtocol())
        return
    config = OffloadConfig(
        cache_budget=cache_budget,
        policy=policy,
        arithmetic=arithmetic,  # type: ignore[arg-type]
        prefetch=None if prefetch is None else PrefetchConfig(predictor=prefetch),
        mmap="auto" if mmap is None else mmap,
    )
    origin = options.origin(revision, token, local_files_only, trust_remote_code)
    loading = origin | {
        "dtype": options.parse_dtype(dtype) or "auto",
        "device_map": options.parse_device_map(device_map),
    }
    expect_file("--json", json_file)
    written = _read(text)
    read_config(model, f"cannot load {model!r}", **origin)
    with options.loaded(model, config, **loading) as offloaded, _progress() as begin:
        passage = _passage(model, offloaded, written, origin, text)
        result = measure(offloaded.eval(), passage, QUICK if quick else Protocol(), begin)
    _show(result)
    if json_file is not None:
        write_json(json_file, result)


def _bench_kernels(json_file: Path | None, protocol: KernelProtocol) -> None:
    expect_file("--json", json_file)
    with _progress() as begin:
        result = measure_kernels(protocol, begin)
    console = Console()
    for name, value in (described(result["conditions"]) | result["kernels"]).items():
        console.print(f"{name}: {value}", soft_wrap=True, markup=False, highlight=False)
    console.print()
    for table in kernel_tables(result):
        show(console, table)
    if json_file is not None:
        write_json(json_file, result)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda what: progress.update(task, description=what)


def _passage(name: str, model: Any, text: str | None, origin: dict[str, Any], path: Path | None) -> Passage:
    """The user's text, or the default of `passage_for`."""
    if text is None:
        return passage_for(model, name, **origin)
    with reading(f"--text needs a tokenizer, which cannot be read from {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name, **origin)
    return text_passage(tokenizer, text, str(path))


def _read(text: Path | None) -> str | None:
    if text is None:
        return None
    try:
        return text.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot read --text {text}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"cannot read --text {text}: {error}") from error


def _show(result: dict[str, Any]) -> None:
    console = Console()
    for name, value in facts(result).items():
        console.print(f"{name}: {value}", soft_wrap=True, markup=False, highlight=False)
    console.print()
    for table in tables(result):
        show(console, table)
    for note in result["notes"]:
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
