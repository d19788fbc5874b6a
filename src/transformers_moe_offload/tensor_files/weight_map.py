"""What a `*.safetensors.index.json` says: which file each tensor is in. The files themselves are not looked at.

Format: `PreTrainedModel.save_pretrained` of Transformers: an object `weight_map`, tensor -> file, and an object
`metadata` with `total_size`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.untrusted import json_object, one_line, quoted


@dataclass(frozen=True)
class WeightMap:
    """The content of an index."""

    files: Mapping[str, str]
    """By tensor, the file it is in, inside the index's folder."""
    total_bytes: int | None
    """Of all tensors, if the index says so."""

    @classmethod
    def read(cls, path: Path, *, needs_metadata: bool = False) -> WeightMap:
        """Read an index; raises `CheckpointError` if the file is not one, or names files outside of its folder.

        With `needs_metadata` also if it has no metadata: Transformers does not read such an index.
        """
        try:
            index = json_object(path)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise CheckpointError(f"{error}; it is not a checkpoint index: download it again") from error
        files = index.get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(
                f"{path} is not a checkpoint index: its weight_map is {quoted(files)}, not an object; download it again"
            )
        for name, file in files.items():
            if not _is_inside(file):
                raise CheckpointError(
                    f"{path} places {one_line(name)} in {quoted(file)}, which is not a file inside its folder; "
                    f"refusing to read outside of {path.parent}"
                )
        metadata = index.get("metadata", None if needs_metadata else {})
        if not isinstance(metadata, dict):
            raise CheckpointError(
                f"{path} has {quoted(metadata)} for metadata, which is not an object; download it again, or write "
                f'"metadata": {{}}'
            )
        return cls(files, _total_bytes(path, metadata))


def _is_inside(file: Any) -> bool:
    """Whether this is the name of a file in a folder or below it."""
    if not isinstance(file, str) or not file or "\0" in file or len(file) > 4096:
        return False
    try:
        os.fsencode(file)
    except UnicodeEncodeError:
        return False
    path = Path(file)
    return path.name != "" and not path.is_absolute() and ".." not in path.parts


def _total_bytes(path: Path, metadata: Mapping[str, Any]) -> int | None:
    total = metadata.get("total_size")
    if total is None:
        return None
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 <= total < 2**63 or not isfinite(total):
        raise CheckpointError(f"{path} has {quoted(total)} for total_size, which is not a number of bytes")
    return int(total)
