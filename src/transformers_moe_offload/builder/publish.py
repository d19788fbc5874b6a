"""`publish`: check a checkpoint of plain weights, and upload it to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from transformers_moe_offload.builder.recipe import Hub
from transformers_moe_offload.builder.writing.folder import CARD_NAME, MARKS, RECIPE_NAME
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hub.upload import Layout, expect_pushable, upload
from transformers_moe_offload.output.place import expect_place
from transformers_moe_offload.tensor_files.checksum import METADATA_KEY, check_file
from transformers_moe_offload.tensor_files.index import check_index_file, read_index, read_metadata

logger = logging.getLogger(__name__)

LAYOUT = Layout(
    last=CONFIG_NAME,
    replaced=("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME),
    message="Built with transformers-moe-offload",
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
    """Upload a checkpoint that was built, with its card and its recipe; returns where it is.

    Every weight file is checked first. After an interruption it can be run again: files on the Hub are not sent twice.

    Args:
        folder: what `build_moe` has written, or one of the functions that edit a mixture.
        repo_id: the repository; it is created where it is missing.
        private: whether a new one is private; None means the account's default.
        revision: branch to upload to; created where it is missing.
        create_pr: upload as a pull request.
        token: of the account; None means the one that `hf auth login` has stored.
    """
    folder = Path(folder)
    check_built(folder)
    if not (folder / CARD_NAME).is_file():
        logger.warning("%s has no README.md: the Hub will show no licence and no base models.", folder)
    api = HfApi(token=token)
    return upload(api, folder, repo_id, LAYOUT, private=private, revision=revision, create_pr=create_pr)


@contextmanager
def published_after(folder: Path, hub: Hub, push: str | None, *, overwrite: bool, token: str | None) -> Iterator[None]:
    """Refuse a folder or a repository that cannot be written to; after the block upload the folder to it, if any."""
    expect_place(folder, MARKS, overwrite=overwrite)
    if push is not None:
        expect_pushable(HfApi(token=token), push)
    yield
    if push is not None:
        publish(folder, push, private=hub.private, revision=hub.revision, create_pr=hub.create_pr, token=token)


def is_built(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that `build_moe` has written or begun."""
    return (folder / RECIPE_NAME).is_file()


def check_built(folder: Path, advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Read all of a checkpoint and compare it with its index and with the checksums of files that have them.

    Raises `CheckpointError` for the first thing that is missing, or not as it was written; `advance` is called with the
    numbers of bytes read.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    weights = sorted(folder.glob("model*.safetensors"))
    if not (folder / CONFIG_NAME).is_file() or not weights:
        missing = CONFIG_NAME if weights else SAFE_WEIGHTS_NAME
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {missing}; build one, or run the build again"
        )
    if len(weights) > 1 or index.is_file():
        check_index_file(index, read_index(weights))
    for file in weights:
        if METADATA_KEY in read_metadata(file):
            check_file(file)
        advance(file.stat().st_size)
