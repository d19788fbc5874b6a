"""`moe-offload push`: check a checkpoint that was quantized or built, and upload it to the Hub."""

from __future__ import annotations

from pathlib import Path

import typer
from huggingface_hub import HfApi

from transformers_moe_offload.builder.publish import is_built, publish
from transformers_moe_offload.hf.prebuilt.publish import publish as publish_prebuilt
from transformers_moe_offload.hub.upload import expect_pushable


def push(folder: Path, repo: str, private: bool, revision: str | None, create_pr: bool, token: str | None) -> None:
    """Check the folder, upload it, and say where it is."""
    upload = publish_prebuilt
    if is_built(folder):
        expect_pushable(HfApi(token=token), repo)
        upload = publish
    url = upload(folder, repo, private=private or None, revision=revision, create_pr=create_pr, token=token)
    typer.echo(f"pushed to {url}")
