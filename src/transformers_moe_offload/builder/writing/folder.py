"""Files of a mixture's folder that other checkpoints do not have, and the files that identify such a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from transformers_moe_offload.output.place import Marks

RECIPE_NAME = "moe_offload_build.json"
"""File name of a mixture's recipe beside its weights; it has the sources' commits, and fingerprints of their files."""

MARKS = Marks(first=RECIPE_NAME, last=CONFIG_NAME, prefix="moe_offload", is_in_place=False)


def without_places(value: Any) -> Any:
    """A recipe with the names of folders and files, without their paths on this machine."""
    if isinstance(value, Mapping):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one) for one in value]
    if isinstance(value, str) and _is_path(value):
        return Path(value).resolve().name
    return value


def _is_path(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a file name, or with bytes that no file name has
        return False
