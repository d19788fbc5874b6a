"""Shared by the subcommands that write checkpoints: checks, interruption, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.output.place import Marks, unfinished


def expect_apart(source: str, folder: Path) -> None:
    """Raise `CommandError` if source and target folder lie inside one another."""
    if not Path(source).is_dir():
        return
    source_path, target = Path(source).resolve(), folder.resolve()
    if target.is_relative_to(source_path) or source_path.is_relative_to(target):
        raise CommandError(f"DST {folder} and SRC {source} lie inside one another; write to a folder of its own")


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
