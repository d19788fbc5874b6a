"""What the subcommands that write checkpoints have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from transformers_moe_offload.cli.blueprint import Blueprint
from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.memory.record import dtype_name


def expect_apart(source: str, folder: Path) -> None:
    """Reading from and writing to one folder would end badly."""
    if not Path(source).is_dir():
        return
    source_path, target = Path(source).resolve(), folder.resolve()
    if target.is_relative_to(source_path) or source_path.is_relative_to(target):
        raise CommandError(f"DST {folder} and SRC {source} lie inside one another; write to a folder of its own")


def plain_config(blueprint: Blueprint) -> dict[str, Any]:
    """`config.json` as saving the plain model would write it."""
    config = blueprint.model.config
    config.dtype = dtype_name(blueprint.dtype)
    config.architectures = [type(blueprint.model).__name__]
    plain: dict[str, Any] = json.loads(config.to_json_string())
    return plain


@contextmanager
def progress(doing: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the time that is left."""
    columns = (TextColumn(doing), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=nbytes)
        yield lambda count: bar.advance(task, count)
