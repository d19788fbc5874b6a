"""Write results to a file, which is there whole or as it was before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers_moe_offload.cli.failures import CommandError


def write_json(path: Path, result: Any) -> None:
    """Write a result as JSON; a file that cannot be written is a `CommandError` and leaves nothing behind."""
    text = json.dumps(result, indent=1) + "\n"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error
