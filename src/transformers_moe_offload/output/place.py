"""Where a checkpoint is written, so that it can be killed at any moment and resumed.

One file is the first in the folder and says by which recipe it is written, another is the last (`Marks`), so that a
folder tells what it is: nothing of ours, a checkpoint in the making, or a complete one. A complete one is only ever
replaced as a whole: the new one is written beside it, in `.NAME.new`, and the two change places at the end, the old
one waiting in `.NAME.old` for its removal. Both carry a mark; what stands there without one, or is a link, is not ours
and is never changed. Which weight files an earlier attempt has finished is in `shards.py`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.tensor_files.writer import PARTIAL, sync_folder, write_text
from transformers_moe_offload.untrusted import json_file, one_line, quoted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_REPLACED = "moe_offload.replaced"
"""The file that says of a folder `.NAME.old` that it is ours."""
_CONTENT = "checkpoint"
"""What the checkpoint in there is called."""
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What systems of files without locks on folders answer; EBADF is Linux's NFS, which locks what is open for writing."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The files by which a folder tells what it is."""

    first: str
    """Holds the recipe; the first file that is written."""
    last: str
    """The file that makes a checkpoint of the folder; the last that is written."""
    prefix: str = ""
    """What the names of all files begin with that belong to such a checkpoint alone; for `replacing`."""
    is_in_place: bool = True
    """Whether a new one is written where it is to be; otherwise it appears there when it is complete."""


class _Left(Enum):
    """What becomes of what is in a folder when it is claimed."""

    EXPECTED = auto()
    """It comes from an attempt by the same recipe, and is gone on with; anything else is refused."""
    USED = auto()
    """The same, but anything else is removed."""
    REMOVED = auto()
    SHARED = auto()
    """It is none of our business."""


def is_complete(folder: Path, marks: Marks) -> bool:
    """Whether a folder holds a whole checkpoint."""
    return (folder / marks.last).is_file()


@contextmanager
def place_for(
    folder: Path,
    recipe: Mapping[str, Any],
    marks: Marks,
    *,
    overwrite: bool = False,
    resume: bool = True,
    discards: tuple[type[Exception], ...] = (),
) -> Iterator[Path]:
    """Where to write a checkpoint, which is in `folder` once the block has ended.

    What was written stays for the next attempt if an exception leaves the block, unless it is one of `discards`;
    without `resume` the attempt before is removed.
    Raises `CheckpointError` and changes nothing if the folder holds something else, a checkpoint by another recipe, or
    a complete one that is not to be overwritten.
    """
    folder = Path(os.path.realpath(folder))
    expect_place(folder, marks, overwrite=overwrite)
    if marks.is_in_place and not is_complete(folder, marks):
        with _claimed(folder, recipe, marks, _Left.EXPECTED if resume else _Left.REMOVED, discards):
            yield folder
        return
    beside = _beside(folder)
    with _claimed(beside, recipe, marks, _Left.USED if resume else _Left.REMOVED, discards):
        yield beside
        assert is_complete(beside, marks), f"{marks.last} is the last file of a checkpoint, and was not written"
    _change_places(folder)


@contextmanager
def replacing(
    folder: Path, recipe: Mapping[str, Any], marks: Marks, *, without: Collection[str] = ()
) -> Iterator[Path]:
    """Where to write a checkpoint, which is in `folder` once the block has ended, instead of one that was there.

    Files that belong to no such checkpoint stay, a tokenizer's for instance, and those of it that are not written anew
    and do not begin as `marks.prefix` says; but not those that it is to be `without`.
    """
    folder = Path(os.path.realpath(folder))
    recover(folder, marks)
    if is_complete(folder, marks):
        _expect_no_strangers_beside(folder, marks)
    else:
        (folder / marks.first).unlink(missing_ok=True)  # of an attempt that left nothing of use
        with _claimed(folder, recipe, marks, _Left.SHARED):
            yield folder
        return
    beside = _beside(folder)
    with _claimed(beside, recipe, marks, _Left.REMOVED):
        yield beside
        _bring_along(folder, beside, marks.prefix, without)
    _change_places(folder)


def _change_places(folder: Path) -> None:
    """Put the checkpoint that was written beside the folder in its place, and remove what was there."""
    try:
        if folder.exists():
            before = _before(folder)
            before.mkdir(exist_ok=True)
            write_text(before / _REPLACED, "")
            folder.rename(before / _CONTENT)
        _beside(folder).rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint is complete in {_beside(folder)}, but cannot be moved to {folder}: {error.strerror}"
        ) from error
    _remove_replaced(folder)


def _bring_along(folder: Path, beside: Path, prefix: str, without: Collection[str]) -> None:
    """What somebody else has put into the folder."""
    for file in folder.iterdir():
        target = beside / file.name
        if file.name.startswith(prefix) or file.name in without or target.exists():
            continue
        if file.is_dir():
            shutil.copytree(file, target, copy_function=_link, symlinks=True)
        else:
            _link(file, target)


def _link(file: Path | str, target: Path | str) -> None:
    """The same file under a second name, or a copy of it where the filesystem has no such thing."""
    try:
        os.link(file, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, target, follow_symlinks=False)


def expect_place(folder: Path, marks: Marks, *, overwrite: bool = False) -> None:
    """Raise `CheckpointError` where `place_for` would, whatever the recipe; asks before anything is downloaded."""
    folder = Path(os.path.realpath(folder))
    recover(folder, marks)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder to write to")
    is_ours = is_complete(folder, marks) or marks.is_in_place
    if folder.is_dir() and not (is_ours and _read_recipe(folder, marks) is not None):
        _expect_empty(folder, marks)
    if is_complete(folder, marks) or not marks.is_in_place:
        _expect_no_strangers_beside(folder, marks)
    if is_complete(folder, marks) and not overwrite:
        raise CheckpointError(
            f"{folder} holds a complete checkpoint; choose another folder, or pass overwrite=True to replace it"
        )


def unfinished(folder: Path, marks: Marks) -> Path | None:
    """Where an interrupted attempt has left what the next one goes on with; None if it has left nothing."""
    folder = Path(os.path.realpath(folder))
    in_place = [folder] if marks.is_in_place and not is_complete(folder, marks) else []
    return next((place for place in (_beside(folder), *in_place) if (place / marks.first).is_file()), None)


def recover(folder: Path, marks: Marks) -> None:
    """Finish or take back a change of places that was interrupted."""
    beside, before = _beside(folder), _before(folder)
    if not (before.exists() and _is_ours(before, _REPLACED)):
        return
    if not folder.exists() and (before / _CONTENT).exists():
        is_written = _is_ours(beside, marks.first) and is_complete(beside, marks)
        (beside if is_written else before / _CONTENT).rename(folder)
    _remove_replaced(folder)


def _remove_replaced(folder: Path) -> None:
    """Remove the checkpoint that was replaced, its mark last; what cannot be removed now is by the next attempt."""
    before = _before(folder)
    shutil.rmtree(before / _CONTENT, ignore_errors=True)
    if not (before / _CONTENT).exists():
        shutil.rmtree(before, ignore_errors=True)


def _is_ours(neighbour: Path, mark: str) -> bool:
    """Whether a folder beside the place is one that this module has made: it carries our mark, or nothing yet."""
    if neighbour.is_symlink() or not neighbour.is_dir():
        return False
    names = {entry.name for entry in neighbour.iterdir()}
    return names <= {mark + PARTIAL} or ((neighbour / mark).is_file() and not (neighbour / mark).is_symlink())


def _expect_no_strangers_beside(folder: Path, marks: Marks) -> None:
    """Raise `CheckpointError` if what stands where we write beside the folder is not ours."""
    for neighbour, mark in ((_beside(folder), marks.first), (_before(folder), _REPLACED)):
        if os.path.lexists(neighbour) and not _is_ours(neighbour, mark):
            raise CheckpointError(
                f"{neighbour} is in the way: while {folder} is written this name is needed, and what has it was not "
                f"made by this package; move it away, or choose another folder"
            )


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _before(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


@contextmanager
def _claimed(
    folder: Path,
    recipe: Mapping[str, Any],
    marks: Marks,
    left: _Left,
    discards: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """A folder that is ours to write to, by this recipe and by no other process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        if left is _Left.EXPECTED:
            _expect(folder, recipe, marks)
        elif left is _Left.REMOVED or (left is _Left.USED and _read_recipe(folder, marks) != recipe):
            _empty(folder, marks)
        for left_over in folder.glob(f"{marks.prefix if left is _Left.SHARED else ''}*{PARTIAL}"):
            left_over.unlink()
        if not (folder / marks.first).exists():
            write_text(folder / marks.first, json.dumps(recipe, indent=2, sort_keys=True) + "\n")
        yield
    except discards:
        _empty(folder, marks)
        folder.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _empty(folder: Path, marks: Marks) -> None:
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
    """Keep other processes out until what is returned is closed, or this process dies; None where the system cannot."""
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
    """Raise `CheckpointError` unless the folder is empty or holds what an earlier attempt by this recipe has left."""
    found = _read_recipe(folder, marks)
    if found is None:
        _expect_empty(folder, marks)
    elif found != recipe:
        name, old, new = _difference(found, recipe)
        raise CheckpointError(
            f"{folder} holds an unfinished checkpoint by another recipe: its {name} is {old}, and now it is {new}; "
            f"choose another folder, or delete this one"
        )


def _expect_empty(folder: Path, marks: Marks) -> None:
    """Nothing may be there but files of ours that are half written."""
    start = marks.prefix or marks.first
    names = sorted(file.name for file in folder.iterdir())
    others = [name for name in names if not (name.startswith(start) and name.endswith(PARTIAL))]
    if others:
        raise CheckpointError(
            f"{folder} is not empty (it has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}) and holds "
            f"no checkpoint that could be resumed; choose an empty or a new folder"
        )


def _read_recipe(folder: Path, marks: Marks) -> Any:
    """What the folder is being written by; None if it does not say."""
    if not (folder / marks.first).exists():
        return None
    try:
        return json_file(folder / marks.first)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {folder} and start again") from None


def _difference(old: Any, new: Any, name: str = "") -> tuple[str, str, str]:
    """Where two recipes differ first, and how."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}, key=str):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    return one_line(name), quoted(old), quoted(new)
