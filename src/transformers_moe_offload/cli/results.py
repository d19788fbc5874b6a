"""Write results to a file: it is complete afterwards, or as it was before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers_moe_offload.cli.failures import CommandError


def expect_file(option: str, path: Path | None) -> None:
    """Raise `CommandError` if the file cannot be written; called before the work whose result it is to hold."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in {path.parent}, which is not a folder"
        raise CommandError(f"cannot write {option} {path}: it {what}; name a file in a folder that exists")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"cannot write {option} {path}: {path.parent} cannot be written to; name another folder")


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
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
