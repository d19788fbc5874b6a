"""Where a checkpoint is written, so that it can be killed at any moment and resumed.

Two files (`Marks`) tell whether a folder holds nothing of ours, an unfinished checkpoint or a complete one: the file
that is written first holds the recipe, and the file that is written last completes the checkpoint. A complete one is
only replaced as a whole: the new one is written to `.NAME.new` beside it, then moved into its place, while the old one
moves to `.NAME.old` and is removed. Both folders carry a mark; a folder or link of that name without one is not ours
and is never changed. `shards.py` checks which weight files an earlier attempt has finished.
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
"""The file that marks a folder `.NAME.old` as ours."""
_CONTENT = "checkpoint"
"""Name of the replaced checkpoint inside `.NAME.old`."""
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


class _Left(Enum):
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
def place_for(
    folder: Path,
    recipe: Mapping[str, Any],
    marks: Marks,
    *,
    overwrite: bool = False,
    resume: bool = True,
    discards: tuple[type[Exception], ...] = (),
) -> Iterator[Path]:
    """The folder to write a checkpoint to; after the block the checkpoint is in `folder`.

    After an exception the files that were written stay for the next attempt, unless it is one of `discards`. Without
    `resume` the files of an earlier attempt are removed.
    Raises `CheckpointError` and changes nothing if the folder holds other files, an unfinished checkpoint by another
    recipe, or a complete one and `overwrite` is False.
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
    """The folder to write a checkpoint to that replaces one in `folder`; after the block it is in `folder`.

    Other files of the folder stay, for instance a tokenizer's, unless the new checkpoint has a file of that name; files
    whose names begin with `marks.prefix` or are in `without` are removed.
    """
    folder = Path(os.path.realpath(folder))
    recover(folder, marks)
    if is_complete(folder, marks):
        _expect_no_strangers_beside(folder, marks)
    else:
        (folder / marks.first).unlink(missing_ok=True)  # its attempt is not resumed
        with _claimed(folder, recipe, marks, _Left.SHARED):
            yield folder
        return
    beside = _beside(folder)
    with _claimed(beside, recipe, marks, _Left.REMOVED):
        yield beside
        _bring_along(folder, beside, marks.prefix, without)
    _change_places(folder)


def _change_places(folder: Path) -> None:
    """Move the checkpoint from beside the folder into its place, and remove the old one."""
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
    """Link the files of the folder that are not part of a checkpoint into the new one beside it."""
    for file in folder.iterdir():
        target = beside / file.name
        if file.name.startswith(prefix) or file.name in without or target.exists():
            continue
        if file.is_dir():
            shutil.copytree(file, target, copy_function=_link, symlinks=True)
        else:
            _link(file, target)


def _link(file: Path | str, target: Path | str) -> None:
    """A hard link, or a copy where the filesystem has no hard links."""
    try:
        os.link(file, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, target, follow_symlinks=False)


def expect_place(folder: Path, marks: Marks, *, overwrite: bool = False, model: str | Path | None = None) -> None:
    """Raise `CheckpointError` where `place_for` would for any recipe; called before anything is downloaded.

    `model` is what the checkpoint is made from; where it is a folder, the two must lie apart.
    """
    output, folder = folder, Path(os.path.realpath(folder))
    source = Path(os.path.realpath(model)) if model is not None and Path(model).is_dir() else None
    if source is not None and (folder.is_relative_to(source) or source.is_relative_to(folder)):
        raise CheckpointError(
            f"output={str(output)!r} and model={str(model)!r} lie inside one another; write to a folder of its own"
        )
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
    """The folder with an unfinished checkpoint that the next attempt would resume; None if there is none."""
    folder = Path(os.path.realpath(folder))
    in_place = [folder] if marks.is_in_place and not is_complete(folder, marks) else []
    return next((place for place in (_beside(folder), *in_place) if (place / marks.first).is_file()), None)


def recover(folder: Path, marks: Marks) -> None:
    """Finish or undo a `_change_places` that was interrupted."""
    beside, before = _beside(folder), _before(folder)
    if not (before.exists() and _is_ours(before, _REPLACED)):
        return
    if not folder.exists() and (before / _CONTENT).exists():
        is_written = _is_ours(beside, marks.first) and is_complete(beside, marks)
        (beside if is_written else before / _CONTENT).rename(folder)
    _remove_replaced(folder)


def _remove_replaced(folder: Path) -> None:
    """Remove the replaced checkpoint, its mark last; the next attempt removes what cannot be removed now."""
    before = _before(folder)
    shutil.rmtree(before / _CONTENT, ignore_errors=True)
    if not (before / _CONTENT).exists():
        shutil.rmtree(before, ignore_errors=True)


def _is_ours(neighbour: Path, mark: str) -> bool:
    """Whether this module made a folder beside the place: it holds our mark, or nothing but an unfinished one."""
    if neighbour.is_symlink() or not neighbour.is_dir():
        return False
    names = {entry.name for entry in neighbour.iterdir()}
    return names <= {mark + PARTIAL} or ((neighbour / mark).is_file() and not (neighbour / mark).is_symlink())


def _expect_no_strangers_beside(folder: Path, marks: Marks) -> None:
    """Raise `CheckpointError` if `.NAME.new` or `.NAME.old` exists and is not ours."""
    for neighbour, mark in ((_beside(folder), marks.first), (_before(folder), _REPLACED)):
        if os.path.lexists(neighbour) and not _is_ours(neighbour, mark):
            raise CheckpointError(
                f"{neighbour} was not made by this package, and its name is needed while {folder} is written; move it "
                f"away, or choose another folder"
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
    """Lock a folder for this process, and prepare it to be written by this recipe."""
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
    """Raise `CheckpointError` if the folder holds anything but partially written files of ours."""
    start = marks.prefix or marks.first
    names = sorted(file.name for file in folder.iterdir())
    others = [name for name in names if not (name.startswith(start) and name.endswith(PARTIAL))]
    if others:
        raise CheckpointError(
            f"{folder} is not empty (it has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}) and holds "
            f"no checkpoint that could be resumed; choose an empty or a new folder"
        )


def _read_recipe(folder: Path, marks: Marks) -> Any:
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
