"""`moe-offload push`: check a checkpoint that was quantized or built, and upload it to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_offload_cli import options


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What `quantize` or `build` has written.", show_default=False)
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="As 'me/my-model-3bit'.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; created where it is missing.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Upload as a pull request.")] = False,
    token: options.Token = None,
) -> None:
    """Upload a checkpoint with quantized experts, or a mixture that was built, after every byte of it was checked.

    Can be run again after an interruption: what the Hub has is not sent twice.
    """
