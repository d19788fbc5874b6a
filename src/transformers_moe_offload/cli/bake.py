"""`moe-offload bake`: a mixture of adapters becomes one of feed-forward blocks, which stock Transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transformers_moe_offload.build import bake_adapters
from transformers_moe_offload.cli import writing
from transformers_moe_offload.cli.building import outcome
from transformers_moe_offload.cli.failures import CommandError, one_line_errors
from transformers_moe_offload.cli.writing import expect_apart


def bake(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A folder with a mixture of adapters, as `build` or training has written it.",
            show_default=False,
        ),
    ],
    folder: writing.Destination,
    container: Annotated[str, typer.Option(help="The model type to make; 'auto' takes the first that fits.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default is the dense model's.")] = None,
    resume: writing.Resume = True,
    overwrite: writing.Overwrite = False,
) -> None:
    """Merge every adapter of a mixture into a feed-forward block of its own, check the result, and put it in DST.

    Can be interrupted or killed at any time: run again, it goes on with what is missing.
    """
    with one_line_errors():
        if not source.is_dir():
            raise CommandError(
                f"there is no folder {source}; name one that `moe-offload build` or training has written"
            )
        expect_apart(str(source), folder)
        info = bake_adapters(source, folder, container=container, dtype=dtype, resume=resume, overwrite=overwrite)
        experts = f"{len(info.experts)} experts, {info.experts_per_token} a token"
        console = Console()
        console.print(f"{info.container}: {experts} ({', '.join(info.experts)})", soft_wrap=True, markup=False)
        console.print(outcome(info), soft_wrap=True, markup=False)
