"""`moe-offload bake`: a mixture of adapters becomes one of feed-forward blocks, which stock Transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_offload_cli import options


def bake(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A folder with a mixture of adapters, as `build` or training has written it.",
            show_default=False,
        ),
    ],
    folder: options.Destination,
    container: Annotated[str, typer.Option(help="The model type to make; 'auto' takes the first that fits.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default is the dense model's.")] = None,
    resume: options.Resume = True,
    overwrite: options.Overwrite = False,
) -> None:
    """Merge every adapter of a mixture into a feed-forward block of its own, check the result, and put it in DST.

    Can be interrupted or killed at any time: run again, it goes on with what is missing.
    """
