"""By what a build that was interrupted tells whether it may be gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers_moe_offload.builder.folder import without_places
from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.sources import Ancestor
from transformers_moe_offload.tensor_files.fingerprint import fingerprint


def build_identity(recipe: MoeRecipe, container: str, ancestors: Sequence[Ancestor]) -> dict[str, Any]:
    """What a build can only go on by if it is the same; says nothing about where sources are on this machine."""
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
    """Of a file with text to calibrate with; data sets on the Hub are known by their names."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
