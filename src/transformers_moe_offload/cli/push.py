"""`moe-offload push`: check a checkpoint that was quantized or built, and upload it to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi

from transformers_moe_offload.build.publish import is_built, publish
from transformers_moe_offload.cli import options
from transformers_moe_offload.cli.failures import one_line_errors
from transformers_moe_offload.hf.prebuilt.publish import LAYOUT, check_prebuilt, expect_complete
from transformers_moe_offload.hub.upload import expect_pushable, upload


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
    with one_line_errors():
        push_folder(folder, repo, private=private, revision=revision, create_pr=create_pr, token=token)


def push_folder(
    folder: Path, repo: str, *, private: bool, revision: str | None, token: str | None, create_pr: bool = False
) -> None:
    """Check and upload a folder, and say where it is."""
    is_private = private or None
    if is_built(folder):
        expect_pushable(HfApi(token=token), repo)
        url = publish(folder, repo, private=is_private, revision=revision, create_pr=create_pr, token=token)
    else:
        expect_complete(folder)
        expect_pushable(HfApi(token=token), repo)
        check_prebuilt(folder)
        api = HfApi(token=token)
        url = upload(api, folder, repo, LAYOUT, private=is_private, revision=revision, create_pr=create_pr)
    typer.echo(f"pushed to {url}")
