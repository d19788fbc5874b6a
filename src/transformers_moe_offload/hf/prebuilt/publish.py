"""Check a prebuilt checkpoint, and upload it to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.prebuilt.layout import GUARD, INDEX_NAME
from transformers_moe_offload.memory.checksum import check_file
from transformers_moe_offload.memory.safetensors_index import check_index_file, read_index
from transformers_moe_offload.memory.safetensors_writer import PARTIAL


def expect_complete(folder: Path) -> None:
    """Raise `CheckpointError` if a folder is no prebuilt checkpoint, or one that is still being written."""
    for name in (INDEX_NAME, "config.json", GUARD.name):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is not a complete prebuilt checkpoint: it has no {name}; "
                f"write one with `moe-offload quantize`, or run that again to finish this one"
            )


def check_prebuilt(folder: Path, advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Read all of a checkpoint and compare it with its index and its checksums; `advance` hears of the bytes read.

    Raises `CheckpointError` for the first thing that is not as it was written.
    """
    expect_complete(folder)
    shards = sorted(folder.glob("moe_offload-*.safetensors"))
    check_index_file(folder / INDEX_NAME, read_index(shards))
    for shard in shards:
        check_file(shard)
        advance(shard.stat().st_size)


def upload(api: HfApi, folder: Path, repo: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Create the repository where it is missing, and upload the folder; returns its address.

    The Hub may take a large folder in several commits. The index goes last, and an older one first, so that no commit
    in between can be loaded. After an interruption it can be run again: what the Hub has is not sent twice.
    """
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        revision=revision,
        commit_message="Experts quantized with transformers-moe-offload",
        ignore_patterns=[f"*{PARTIAL}", INDEX_NAME],
        delete_patterns=[INDEX_NAME, "moe_offload-*.safetensors"],
    )
    commit = api.upload_file(
        repo_id=repo,
        path_or_fileobj=folder / INDEX_NAME,
        path_in_repo=INDEX_NAME,
        revision=revision,
        commit_message="The index of the weights",
    )
    return str(commit.repo_url)
