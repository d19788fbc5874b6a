"""`moe-offload push`: check a checkpoint with quantized experts, and upload it to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from transformers_moe_offload.cli import options
from transformers_moe_offload.cli.failures import CommandError, one_line_errors
from transformers_moe_offload.hf.prebuilt.publish import check_prebuilt, expect_complete, upload


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `quantize` has written.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="As 'me/my-model-3bit'.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; created where it is missing.")] = None,
    token: options.Token = None,
) -> None:
    """Upload a checkpoint with quantized experts, after every byte of it was checked.

    Can be run again after an interruption: what the Hub has is not sent twice.
    """
    with one_line_errors():
        push_folder(folder, repo, private=private, revision=revision, token=token)


def expect_pushable(repo: str, token: str | None) -> None:
    """Raise `CommandError` for a repository that cannot be, or a token that the Hub does not know."""
    try:
        HfApi(token=token).repo_exists(repo)
        HfApi(token=token).whoami()
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CommandError(f"cannot upload to {repo!r}: {error}") from error


def push_folder(folder: Path, repo: str, *, private: bool, revision: str | None, token: str | None) -> None:
    """Check and upload a folder, and say where it is."""
    expect_complete(folder)
    expect_pushable(repo, token)
    check_prebuilt(folder)
    try:
        url = upload(HfApi(token=token), folder, repo, private=private or None, revision=revision)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CommandError(f"cannot upload to {repo!r}: {error}") from error
    typer.echo(f"pushed to {url}")
