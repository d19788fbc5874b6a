"""Where a checkpoint is written, so that it can be killed at any moment and resumed.

Two files (`Marks`) tell whether a folder holds nothing of ours, an unfinished checkpoint or a complete one: the file
that is written first holds the recipe, and the file that is written last completes the checkpoint. A complete one is
only replaced as a whole: the new one is written to `.NAME.new` beside it, then moved into its place, while the old one
moves to `.NAME.old` and is removed. Both folders carry a mark; a folder or link of that name without one is not ours
and is never changed. `shards.py` checks which weight files an earlier attempt has finished.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.output.claim import Left, Marks, claimed, expect_empty, is_complete, read_recipe
from transformers_moe_offload.tensor_files.writer import PARTIAL, sync_folder, write_text
from transformers_moe_offload.untrusted import reading

logger = logging.getLogger(__name__)

_REPLACED = "moe_offload.replaced"
"""The file that marks a folder `.NAME.old` as ours."""
_CONTENT = "checkpoint"
"""Name of the replaced checkpoint inside `.NAME.old`."""


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
        with claimed(folder, recipe, marks, Left.EXPECTED if resume else Left.REMOVED, discards):
            yield folder
        return
    beside = _beside(folder)
    with claimed(beside, recipe, marks, Left.USED if resume else Left.REMOVED, discards):
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
        with claimed(folder, recipe, marks, Left.SHARED):
            yield folder
        return
    beside = _beside(folder)
    with claimed(beside, recipe, marks, Left.REMOVED):
        yield beside
        _bring_along(folder, beside, marks.prefix, without)
    _change_places(folder)


def _change_places(folder: Path) -> None:
    """Move the checkpoint from beside the folder into its place, and remove the old one."""
    with reading(f"the checkpoint is complete in {_beside(folder)}, but cannot be moved to {folder}"):
        if folder.exists():
            before = _before(folder)
            before.mkdir(exist_ok=True)
            write_text(before / _REPLACED, "")
            folder.rename(before / _CONTENT)
        _beside(folder).rename(folder)
        sync_folder(folder.parent)
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
    if folder.is_dir() and not (is_ours and read_recipe(folder, marks) is not None):
        expect_empty(folder, marks)
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
