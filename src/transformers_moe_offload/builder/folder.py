"""What a mixture's folder holds beside what every checkpoint has, and by which files it tells what it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from transformers_moe_offload.output.place import Marks

RECIPE_NAME = "moe_offload_build.json"
"""What a mixture's recipe is called beside its weights: with the sources' commits, or how their files can be told."""

MARKS = Marks(first=RECIPE_NAME, last=CONFIG_NAME, prefix="moe_offload", is_in_place=False)


def without_places(value: Any) -> Any:
    """A recipe in which folders and files are named without where they are on this machine."""
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
    except (OSError, ValueError):  # too long for a name, or with bytes that no name has
        return False
