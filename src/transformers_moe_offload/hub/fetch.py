"""The files of a plain checkpoint, in a folder or downloaded from the Hub as `from_pretrained` would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.upstream import resolved_checkpoint_files
from transformers_moe_offload.hub.companions import CARD, COMPANIONS, companions_in, files_in

CONNECTION_FAILED: Any = HfHubHTTPError.__bases__[0]
"""What the HTTP client of huggingface_hub raises; which client that is depends on the version."""


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
    """Tokenizer, generation settings, licence: the files that do not depend on how the weights are stored, see
    `companions.py`. `published` gives the content to copy."""
    card: Path | None


def fetch(name: str, config: Any, options: Mapping[str, Any]) -> Fetched:
    """Find a checkpoint and download missing files; `options` are `revision`, `token` and `local_files_only`."""
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
    """As `fetch`, but without the weights."""
    is_local = Path(name).is_dir()
    patterns = [*COMPANIONS, CARD, "*.index.json"]  # an index names the files that hold the weights
    folder = Path(name) if is_local else Path(snapshot_download(name, allow_patterns=patterns, **options))
    return Fetched(
        folder.resolve().name if is_local else name,
        None if is_local else folder.name,
        folder,
        (),
        tuple(companions_in(folder)),
        next(iter(files_in(folder, (CARD,))), None),
    )
