"""`publish`: check a prebuilt checkpoint, and upload it to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.prebuilt.names import GUARD, INDEX_NAME
from transformers_moe_offload.hub.upload import Layout, expect_pushable, upload
from transformers_moe_offload.tensor_files.checksum import check_file
from transformers_moe_offload.tensor_files.index import check_index_file, read_index

LAYOUT = Layout(
    last=INDEX_NAME,
    replaced=("moe_offload-*.safetensors",),
    message="Experts quantized with transformers-moe-offload",
)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Check a whole checkpoint and upload it, with the arguments of `builder.publish`; returns where it is."""
    folder = Path(folder)
    expect_complete(folder)
    api = HfApi(token=token)
    expect_pushable(api, repo_id)
    check_prebuilt(folder)
    return upload(api, folder, repo_id, LAYOUT, private=private, revision=revision, create_pr=create_pr)


def expect_complete(folder: Path) -> None:
    """Raise `CheckpointError` if a folder is not a prebuilt checkpoint, or an unfinished one."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; name what `moe-offload quantize` or `build` has written")
    for name in (INDEX_NAME, "config.json", GUARD.name):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is not a complete prebuilt checkpoint: it has no {name}; "
                f"write one with `moe-offload quantize`, or run that again to finish this one"
            )


def check_prebuilt(folder: Path, advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Compare a whole checkpoint with its index and its checksums; `advance` is called with the bytes of each shard.

    Raises `CheckpointError` for the first mismatch.
    """
    expect_complete(folder)
    shards = sorted(folder.glob("moe_offload-*.safetensors"))
    check_index_file(folder / INDEX_NAME, read_index(shards))
    for shard in shards:
        check_file(shard)
        advance(shard.stat().st_size)
