"""The files of a tokenizer, which go along byte for byte: what loads and saves one changes its settings."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from transformers_moe_offload.errors import CheckpointError

_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*", "*.model",
    "*.tiktoken",
)  # fmt: skip


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to a tokenizer."""
    return any(fnmatch(name, pattern) for pattern in _FILES)


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
                    allow_patterns=list(_FILES),
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot read the tokenizer {name}: {' '.join(str(error).split())}") from error
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and is_tokenizer_file(file.name)]
    if not files:
        raise CheckpointError(f"{name} has no tokenizer; set tokenizer to a model that has one, or leave it out")
    return files
