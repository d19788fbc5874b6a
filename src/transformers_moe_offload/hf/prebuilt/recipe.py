"""The recipe of a prebuilt checkpoint, its source and formats: equal recipes give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.tensor_files.checksum import fingerprint


def recipe_of(
    name: str, revision: str | None, files: Sequence[Path], dtype: str, config: OffloadConfig
) -> dict[str, Any]:
    """The recipe, from the files of the plain checkpoint; contains no paths of this machine."""
    return {
        "source": {
            "name": name,
            "revision": revision,
            "dtype": dtype,
            "files": {file.name: fingerprint(file) for file in files},
        },
        **config.recipe(),
    }
