"""`moe-offload convert`: a checkpoint in the layout of another project becomes a prebuilt one, without requantizing."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moe_offload_cli import options


class Layout(StrEnum):
    """The layouts that can be read."""

    MIXTRAL_OFFLOADING = "mixtral-offloading"


def convert(
    source: options.Source,
    folder: options.Destination,
    layout: Annotated[Layout, typer.Option("--from", help="The layout of SRC.", show_default=False)],
    workers: options.Workers = None,
    overwrite: options.Overwrite = False,
    base_model: Annotated[str | None, typer.Option(help="The Hub's id of the model that SRC was made from.")] = None,
    revision: options.Revision = "main",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
) -> None:
    """Convert a checkpoint that another project has quantized into one that loads like any other.

    Codes, scales and zeros of experts stay what they are; quantized dense weights are decoded to float16. Can be
    interrupted or killed at any time: run again, it goes on with what is missing.
    """
