"""The files of a tokenizer, which are copied unchanged: loading and saving a tokenizer changes its settings."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hub.companions import TOKENIZER_FILES, files_in


def tokenizer_files(name: str, *, token: str | None = None, local_files_only: bool = False) -> list[Path]:
    """The files of the tokenizer in a folder, or of an id on the Hub, or `id@revision`."""
    folder = Path(name)
    if not folder.is_dir():
        repo, _, revision = name.partition("@")
        try:
            folder = Path(
                snapshot_download(
                    repo,
                    revision=revision or None,
                    allow_patterns=list(TOKENIZER_FILES),
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot read the tokenizer {name}: {' '.join(str(error).split())}") from error
    files = files_in(folder, TOKENIZER_FILES)
    if not files:
        raise CheckpointError(f"{name} has no tokenizer; set tokenizer to a model that has one, or leave it out")
    return files
