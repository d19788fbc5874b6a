"""`moe-offload push`: check a checkpoint that was quantized or built, and upload it to the Hub."""

from __future__ import annotations

from pathlib import Path

import typer
from huggingface_hub import HfApi

from transformers_moe_offload.builder.publish import is_built, publish
from transformers_moe_offload.hf.prebuilt.publish import LAYOUT, check_prebuilt, expect_complete
from transformers_moe_offload.hub.upload import expect_pushable, upload


def push(
    folder: Path,
    repo: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    token: str | None,
) -> None:
    """Check the folder, upload it, and say where it is."""
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
