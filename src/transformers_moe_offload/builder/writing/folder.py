"""A mixture's folder: the names of its files, the key by which an interrupted build is resumed, and the place beside it
that a build writes to."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.sources import Ancestor
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.output.claim import Marks
from transformers_moe_offload.output.place import place_for
from transformers_moe_offload.tensor_files.checksum import fingerprint

logger = logging.getLogger(__name__)

RECIPE_NAME = "moe_offload_build.json"
"""File name of a mixture's recipe beside its weights; it has the sources' commits, and fingerprints of their files."""
INFO_NAME = "moe_offload_info.json"
"""File name of its figures."""
CARD_NAME = "README.md"

MARKS = Marks(first=RECIPE_NAME, last=CONFIG_NAME, prefix="moe_offload", is_in_place=False)


@contextmanager
def build_place(
    folder: Path,
    recipe: MoeRecipe,
    container: str,
    ancestors: Sequence[Ancestor],
    warnings: Sequence[str],
    *,
    overwrite: bool,
    resume: bool,
) -> Iterator[Path]:
    """Log the plan's warnings, and open the place that a mixture is written to; after the block it is in `folder`.

    A mixture that fails a check leaves nothing.
    """
    for warning in warnings:
        logger.warning(warning)
    key = resume_key(recipe, container, ancestors)
    with place_for(folder, key, MARKS, overwrite=overwrite, resume=resume, discards=(RecipeError,)) as place:
        yield place


def resume_key(recipe: MoeRecipe, container: str, ancestors: Sequence[Ancestor]) -> dict[str, Any]:
    """Everything that has to be the same for a build to be resumed, without the sources' paths on this machine."""
    return {
        "recipe": without_places(recipe.to_dict()),
        "container": container,
        "sources": [
            {"name": one.name, "revision": one.revision, "files": {file.name: fingerprint(file) for file in one.files}}
            for one in ancestors
        ],
        "texts": {Path(dataset.path).name: _digest(Path(dataset.path)) for dataset in recipe.datasets},
    }


def _digest(path: Path) -> str | None:
    """SHA-256 of a file with calibration text; None for a data set on the Hub, which is known by its name."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def without_places(value: Any) -> Any:
    """A recipe with the names of folders and files, without their paths on this machine."""
    if isinstance(value, Mapping):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one) for one in value]
    if isinstance(value, str) and os.path.exists(value):
        return Path(value).resolve().name
    return value
