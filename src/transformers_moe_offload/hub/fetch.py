"""The files of a plain checkpoint, in a folder or downloaded from the Hub as `from_pretrained` would.

Beside the weights, these are companions: tokenizer, processors, generation settings, licence. Other files in the folder
are ignored, and a link that leads out of it is an error: copies of companions are meant to be published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.upstream import resolved_checkpoint_files

CARD = "README.md"

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
    # Vocabularies: what the tokenizers of Transformers 5.24 call them (`VOCAB_FILES_NAMES`), and Mistral's.
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v*", "tekken.json", "*.tiktoken",
    "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model", "spm_char.model", "source.spm",
    "target.spm", "dict.txt", "emoji.json", "byte_maps.json", "entity_vocab.json", "prophetnet.tokenizer", "bpe.codes",
    "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "normalizer.json", "word_shape.json",
    "word_pronunciation.json",
)  # fmt: skip
OTHER_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
COMPANIONS = (*TOKENIZER_FILES, *OTHER_FILES)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PLACES = (
    "name_or_path", "_name_or_path", "base_model_name_or_path", "tokenizer_file", "vocab_file", "merges_file",
    "special_tokens_map_file",
)  # fmt: skip
"""Settings in which libraries record where a model or a tokenizer was loaded from: a path, or an id on the Hub."""

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
    """The files that do not depend on how the weights are stored. `published` gives the content to copy."""
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


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to a tokenizer."""
    return _matches(name, TOKENIZER_FILES)


def companions_in(folder: Path) -> list[Path]:
    """The companion files in a folder, without its card; raises as `files_in` does."""
    return files_in(folder, COMPANIONS)


def files_in(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder whose names match one of the patterns, sorted by name.

    Raises `CheckpointError` for a link that leads out of the folder, or, for a snapshot in the Hub's cache, out of its
    repository there.
    """
    return [file for file in sorted(folder.iterdir()) if _matches(file.name, patterns) and _is_inside(file)]


def published(file: Path) -> bytes:
    """The content of a file to publish: settings without references to code (`auto_map`) or paths on this machine."""
    content = file.read_bytes()
    if not file.name.endswith("config.json"):
        return content
    try:
        settings = json.loads(content)
    except ValueError:
        return content  # copied as it is: loading it reports what is wrong
    kept = dict(_publishable(settings)) if isinstance(settings, dict) else settings
    return content if kept == settings else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _publishable(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        # The code is not copied; with this entry trust_remote_code=True would run what another repository then holds.
        is_code = key == "auto_map"
        is_place = key in _PLACES and isinstance(value, str) and _HUB_ID.fullmatch(value) is None
        if not is_code and not is_place:
            yield key, value


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_inside(file: Path) -> bool:
    """Whether this is a file; raises `CheckpointError` for a link to a file outside `_root`."""
    if not file.is_file():
        return False
    root = _root(file.parent.resolve())
    if not file.resolve().is_relative_to(root):
        raise CheckpointError(
            f"{file} is a link that leads out of {root}, and its target would be copied into the output; replace the "
            f"link by a copy of the file, or remove it"
        )
    return True


def _root(folder: Path) -> Path:
    """The folder that links must stay in: the folder itself, or its repository's folder in the Hub's cache.

    Files of a snapshot, `models--org--name/snapshots/COMMIT`, are links to `models--org--name/blobs`.
    """
    repository = folder.parent.parent
    is_snapshot = folder.parent.name == "snapshots" and (repository / "blobs").is_dir()
    return repository if is_snapshot else folder
