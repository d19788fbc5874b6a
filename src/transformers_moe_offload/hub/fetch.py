"""The files of a plain checkpoint, in a folder or downloaded from the Hub as `from_pretrained` would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.upstream import resolved_checkpoint_files

_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*")
_NOT_COMPANIONS = ("config.json", "*.index.json", "adapter_config.json", "moe_offload*")
_CARD = "README.md"


@dataclass(frozen=True)
class Fetched:
    """A checkpoint that is on this machine."""

    name: str
    """Its id on the Hub, or the name of its folder."""
    revision: str | None
    """Its commit, if it is from the Hub."""
    folder: Path
    weights: tuple[Path, ...]
    companions: tuple[Path, ...]
    """Tokenizer, generation settings, licence: what goes with the model whatever its weights are stored as."""
    card: Path | None


def fetch(name: str, config: Any, options: Mapping[str, Any]) -> Fetched:
    """Find a checkpoint, and download what is not there; `options` are `revision`, `token` and `local_files_only`."""
    files, _ = resolved_checkpoint_files(
        name,
        variant=None,
        gguf_file=None,
        use_safetensors=True,
        user_agent=None,
        is_remote_code=False,
        transformers_explicit_filename=getattr(config, "transformers_weights", None),
        download_kwargs=dict(options),
    )
    if not files:
        raise CheckpointError(f"{name} holds no weights")
    return replace(fetch_small(name, options), weights=tuple(Path(file) for file in files))


def fetch_small(name: str, options: Mapping[str, Any]) -> Fetched:
    """The same without weights."""
    is_local = Path(name).is_dir()
    patterns = [*_COMPANIONS, _CARD]
    folder = Path(name) if is_local else Path(snapshot_download(name, allow_patterns=patterns, **options))
    companions = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and any(fnmatch(file.name, pattern) for pattern in _COMPANIONS)
        and not any(fnmatch(file.name, pattern) for pattern in _NOT_COMPANIONS)
    ]
    card = folder / _CARD
    return Fetched(
        folder.resolve().name if is_local else name,
        None if is_local else folder.name,
        folder,
        (),
        tuple(companions),
        card if card.is_file() else None,
    )
