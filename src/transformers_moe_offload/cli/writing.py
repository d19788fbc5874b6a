"""What subcommands write: checkpoints, with progress and interruption, and results in files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.output.claim import Marks
from transformers_moe_offload.output.place import unfinished
from transformers_moe_offload.tensor_files.writer import write_text


@contextmanager
def resumable(folder: Path, marks: Marks, *, resume: bool = True) -> Iterator[None]:
    """Say on stderr how to go on, or what to remove, when Ctrl-C ends the writing of a checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        left = unfinished(folder, marks)
        again = "run the same command again" if resume else "run the command again without --no-resume"
        how = f"; {again} to go on from what is in {left}, or remove that" if left is not None else ""
        typer.echo(f"interrupted{how}", err=True)
        raise


@contextmanager
def progress(doing: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the time that is left."""
    columns = (TextColumn(doing), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=nbytes)
        yield lambda count: bar.advance(task, count)


def expect_file(option: str, path: Path | None) -> None:
    """Raise `CommandError` if the file cannot be written; called before the work whose result it is to hold."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in {path.parent}, which is not a folder"
        raise CommandError(f"cannot write {option} {path}: it {what}; name a file in a folder that exists")
    if path.exists() and not path.is_file():  # writing would put a file in place of a device or a pipe
        raise CommandError(f"cannot write {option} {path}: it is a device or a pipe; name a file")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"cannot write {option} {path}: {path.parent} cannot be written to; name another folder")


def write_json(path: Path | None, result: Any) -> None:
    """Write a result as JSON, if a file is named: it is complete afterwards, or as it was before."""
    if path is not None:
        write_text(path, json.dumps(result, indent=1) + "\n")
