"""Lock a folder that is to be written, and tell from its marks what it holds."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.tensor_files.writer import PARTIAL, as_json, write_text
from transformers_moe_offload.untrusted import json_file, one_line, quoted, reading

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems that cannot lock folders; EBADF is Linux's NFS, which locks only files open for writing."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The files that tell what a folder holds."""

    first: str
    """The file that is written first; holds the recipe."""
    last: str
    """The file that is written last; a folder with it is a complete checkpoint."""
    prefix: str = ""
    """Prefix of the names of all files that only such a checkpoint has; for `replacing`."""
    is_in_place: bool = True
    """Whether a new checkpoint is written to its final folder directly; if not, it is moved there when complete."""


class Left(Enum):
    """What happens to the content of a folder when it is claimed."""

    EXPECTED = auto()
    """Left by an attempt with the same recipe: resumed. Any other content is an error."""
    USED = auto()
    """Left by an attempt with the same recipe: resumed. Any other content is removed."""
    REMOVED = auto()
    SHARED = auto()
    """Left alone: the folder also holds files of others."""


def is_complete(folder: Path, marks: Marks) -> bool:
    """Whether a folder holds a whole checkpoint."""
    return (folder / marks.last).is_file()


@contextmanager
def claimed(
    folder: Path, recipe: Mapping[str, Any], marks: Marks, left: Left, discards: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Lock a folder for this process, and prepare it to be written by this recipe."""
    with reading(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    try:
        if left is Left.EXPECTED:
            _expect(folder, recipe, marks)
        elif left is Left.REMOVED or (left is Left.USED and read_recipe(folder, marks) != recipe):
            empty(folder, marks)
        for left_over in folder.glob(f"{marks.prefix if left is Left.SHARED else ''}*{PARTIAL}"):
            left_over.unlink()
        if not (folder / marks.first).exists():
            write_text(folder / marks.first, as_json(recipe))
        yield
    except discards:
        empty(folder, marks)
        folder.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def empty(folder: Path, marks: Marks) -> None:
    """Remove what is in a folder of ours. However far that comes, the folder is told as ours: its first mark goes last.

    It is told as complete no longer than it is.
    """
    order = {marks.last: 0, marks.first: 2}
    for entry in sorted(folder.iterdir(), key=lambda entry: order.get(entry.name, 1)):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or this process ends; None where locks are unsupported."""
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise CheckpointError(
            f"another process is writing to {folder}; wait for it, or choose another folder"
        ) from None
    except OSError as error:
        os.close(lock)
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s); see to it that no other process writes there", folder, error.strerror)
        return None
    return lock


def _expect(folder: Path, recipe: Mapping[str, Any], marks: Marks) -> None:
    """Raise `CheckpointError` unless the folder is empty or holds an unfinished checkpoint by this recipe."""
    found = read_recipe(folder, marks)
    if found is None:
        expect_empty(folder, marks)
    elif found != recipe:
        name, old, new = _difference(found, recipe)
        raise CheckpointError(
            f"{folder} holds an unfinished checkpoint by another recipe: its {name} is {old}, and now it is {new}; "
            f"choose another folder, or delete this one"
        )


def expect_empty(folder: Path, marks: Marks) -> None:
    """Raise `CheckpointError` if the folder holds anything but partially written files of ours."""
    start = marks.prefix or marks.first
    names = sorted(file.name for file in folder.iterdir())
    others = [name for name in names if not (name.startswith(start) and name.endswith(PARTIAL))]
    if others:
        raise CheckpointError(
            f"{folder} is not empty (it has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}) and holds "
            f"no checkpoint that could be resumed; choose an empty or a new folder"
        )


def read_recipe(folder: Path, marks: Marks) -> Any:
    """The recipe that a folder is written by; None if it has no such file."""
    if not (folder / marks.first).exists():
        return None
    try:
        return json_file(folder / marks.first)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {folder} and start again") from None


def _difference(old: Any, new: Any, name: str = "") -> tuple[str, str, str]:
    """The first setting in which two recipes differ: its name, the old value and the new one."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}, key=str):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    return one_line(name), quoted(old), quoted(new)
