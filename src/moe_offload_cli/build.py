"""`moe-offload build`: make a mixture of experts from dense models or adapters, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_offload_cli import options


def build(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file, ours or mergekit-moe's.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")] = False,
    resume: options.Resume = True,
    overwrite: options.Overwrite = False,
    push: Annotated[str | None, typer.Option(help="Upload to this repository when done, as the recipe says.")] = None,
    device: Annotated[str, typer.Option(help="Where the base model's layers run while gates are computed.")] = "cpu",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
) -> None:
    """Build a mixture of experts from dense models or adapters, check it, and put it in OUT.

    Can be interrupted or killed at any time: run again, it goes on with what is missing.
    """
