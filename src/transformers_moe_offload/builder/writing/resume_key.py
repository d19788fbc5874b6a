"""The identity of a build: an interrupted build is resumed only by one with the same identity."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.sources import Ancestor
from transformers_moe_offload.builder.writing.folder import without_places
from transformers_moe_offload.tensor_files.fingerprint import fingerprint


def resume_key(recipe: MoeRecipe, container: str, ancestors: Sequence[Ancestor]) -> dict[str, Any]:
    """Everything that has to be the same for a build to be resumed, without the sources' paths on this machine."""
    sources = [
        {
            "name": one.name,
            "revision": one.revision,
            "files": {file.name: fingerprint(file) for file in one.files},
        }
        for one in ancestors
    ]
    texts = {Path(dataset.path).name: _digest(Path(dataset.path)) for dataset in recipe.datasets}
    return {
        "recipe": without_places(recipe.to_dict()),
        "container": container,
        "sources": sources,
        "texts": texts,
    }


def _digest(path: Path) -> str | None:
    """SHA-256 of a file with calibration text; None for a data set on the Hub, which is known by its name."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
