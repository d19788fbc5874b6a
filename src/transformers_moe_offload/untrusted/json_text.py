"""Read untrusted JSON. Every fault in the text raises one error of ours; the caller checks what the values mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers_moe_offload.errors import CheckpointError, MoeOffloadError
from transformers_moe_offload.untrusted.messages import one_line

MAX_BYTES = 100_000_000
"""Size limit of a text: the limit that the safetensors library sets to headers. The largest index on the Hub has
10 MB."""
MAX_DEPTH = 100
"""Levels of nesting: configs have up to 6, and functions that copy or write values recurse once per level."""


def parse_json(content: str | bytes, what: str, error: type[MoeOffloadError] = CheckpointError) -> Any:
    """The value of a text. `what` names the text in the error that invalid JSON raises."""
    try:
        value = json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except RecursionError as cause:
        raise error(f"{what} is not valid JSON: it is nested too deeply") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{what} is not valid JSON: it is not text in UTF-8") from cause
    except ValueError as cause:
        raise error(f"{what} is not valid JSON: {one_line(cause)}") from cause
    if not _is_within(value, MAX_DEPTH):
        raise error(f"{what} is nested more than {MAX_DEPTH} levels deep")
    return value


def json_file(path: Path, error: type[MoeOffloadError] = CheckpointError) -> Any:
    """The value in a file; raises `error` if it cannot be read, is too large or is not valid JSON."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as cause:
        raise error(f"cannot read {one_line(path)}: {cause.strerror}") from cause
    except ValueError as cause:  # an invalid file name
        raise error(f"cannot read {one_line(path)}: {one_line(cause)}") from cause
    if len(content) > MAX_BYTES:
        raise error(f"{one_line(path)} has more than {MAX_BYTES:,} bytes, the most that are read")
    return parse_json(content, one_line(path), error)


def json_object(path: Path) -> dict[str, Any]:
    """The object in a file; raises `CheckpointError` for any other value."""
    value = json_file(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{one_line(path)} is not a JSON object but a {type(value).__name__}")
    return value


def _is_within(value: Any, max_depth: int) -> bool:
    """Whether a value is nested at most `max_depth` levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(max_depth):
        inner = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return True
    return not level
