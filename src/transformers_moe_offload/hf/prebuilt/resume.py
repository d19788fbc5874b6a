"""Where a prebuilt checkpoint is written, and what of it an earlier attempt has finished.

The recipe is the first file in the folder and the index the last, so that a folder tells what it is: nothing of ours,
a checkpoint in the making and by which recipe, or a complete one. A complete one is only ever replaced as a whole: the
new one is written beside it, and the two change places at the end.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hf.prebuilt.layout import INDEX_NAME, RECIPE_NAME, Shard
from transformers_moe_offload.memory.checksum import check_file
from transformers_moe_offload.memory.safetensors_index import read_metadata
from transformers_moe_offload.memory.safetensors_writer import PARTIAL, sync_folder, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole prebuilt checkpoint."""
    return (folder / INDEX_NAME).is_file()


@contextmanager
def place_for(folder: Path, recipe: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Path]:
    """Where to write a checkpoint, which is in `folder` once the block has ended.

    Raises `CheckpointError` and changes nothing if the folder holds something else, a checkpoint by another recipe, or
    a complete one that is not to be overwritten.
    """
    folder = Path(os.path.realpath(folder))
    expect_place(folder, overwrite=overwrite)
    if not is_complete(folder):
        with _claimed(folder, recipe):
            yield folder
        return
    beside = _beside(folder)
    if beside.exists() and _read_recipe(beside) != recipe:
        shutil.rmtree(beside)
    with _claimed(beside, recipe):
        yield beside
    _change_places(folder)


@contextmanager
def replacing(folder: Path, recipe: Mapping[str, Any]) -> Iterator[Path]:
    """Where to write a checkpoint, which is in `folder` once the block has ended, instead of one that was there.

    Files that belong to no such checkpoint stay, a tokenizer's for instance.
    """
    folder = Path(os.path.realpath(folder))
    recover(folder)
    if not is_complete(folder):
        (folder / RECIPE_NAME).unlink(missing_ok=True)  # of an attempt that left nothing of use
        with _claimed(folder, recipe, is_shared=True):
            yield folder
        return
    beside = _beside(folder)
    shutil.rmtree(beside, ignore_errors=True)
    with _claimed(beside, recipe):
        yield beside
        _bring_along(folder, beside)
    _change_places(folder)


def _change_places(folder: Path) -> None:
    """Put the checkpoint that was written beside the folder in its place, and remove what was there."""
    folder.rename(_before(folder))
    _beside(folder).rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(_before(folder))


def _bring_along(folder: Path, beside: Path) -> None:
    """What somebody else has put into the folder."""
    for file in folder.iterdir():
        target = beside / file.name
        if file.name.startswith("moe_offload") or target.exists():
            continue
        if file.is_dir():
            shutil.copytree(file, target, copy_function=os.link, symlinks=True)
        else:
            os.link(file, target, follow_symlinks=False)


def expect_place(folder: Path, *, overwrite: bool = False) -> None:
    """Raise `CheckpointError` where `place_for` would, whatever the recipe; asks before anything is downloaded."""
    folder = Path(os.path.realpath(folder))
    recover(folder)
    if is_complete(folder) and not overwrite:
        raise CheckpointError(
            f"{folder} holds a complete checkpoint; choose another folder, or pass --overwrite to replace it"
        )
    if folder.is_dir() and _read_recipe(folder) is None:
        _expect_empty(folder)


def recover(folder: Path) -> None:
    """Finish or take back a change of places that was interrupted."""
    beside, before = _beside(folder), _before(folder)
    if not before.exists():
        return
    if folder.exists():
        shutil.rmtree(before)
    else:
        (beside if is_complete(beside) else before).rename(folder)
        recover(folder)


def is_finished(shard: Shard, folder: Path) -> bool:
    """Whether a shard is there and is what was written, by the checksums in it; a damaged one is reported."""
    path = folder / shard.name
    if not path.exists():
        return False
    try:
        found, metadata = check_file(path), read_metadata(path)
    except CheckpointError as error:
        logger.warning(f"writing {path} again: {error}")
        return False
    tensors = tuple(FieldSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in found)
    return tensors == shard.tensors and shard.metadata.items() <= metadata.items()


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _before(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


@contextmanager
def _claimed(folder: Path, recipe: Mapping[str, Any], *, is_shared: bool = False) -> Iterator[None]:
    """A folder that is ours to write to, by this recipe and by no other process.

    What is in it already has to come from an attempt by the same recipe, unless it `is_shared` with others.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        if not is_shared:
            _expect(folder, recipe)
        for left_over in folder.glob(f"*{PARTIAL}"):
            left_over.unlink()
        if not (folder / RECIPE_NAME).exists():
            write_text(folder / RECIPE_NAME, json.dumps(recipe, indent=2, sort_keys=True) + "\n")
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Keep other processes out until what is returned is closed, or this process dies; where the system can."""
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
    return lock


def _expect(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the folder is empty or holds what an earlier attempt by this recipe has left."""
    found = _read_recipe(folder)
    if found is None:
        _expect_empty(folder)
    elif found != recipe:
        name, old, new = _difference(found, recipe)
        raise CheckpointError(
            f"{folder} holds an unfinished checkpoint by another recipe: its {name} is {old}, and now it is {new}; "
            f"choose another folder, or delete this one"
        )


def _expect_empty(folder: Path) -> None:
    others = sorted(file.name for file in folder.iterdir() if not file.name.endswith(PARTIAL))
    if others:
        raise CheckpointError(
            f"{folder} is not empty (it has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}) and holds "
            f"no checkpoint that could be resumed; choose an empty or a new folder"
        )


def _read_recipe(folder: Path) -> Any:
    """What the folder is being written by; None if it does not say."""
    try:
        return json.loads((folder / RECIPE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise CheckpointError(f"{folder / RECIPE_NAME} is not JSON; delete {folder} and start again") from None


def _difference(old: Any, new: Any, name: str = "") -> tuple[str, str, str]:
    """Where two recipes differ first, and how."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    return name, json.dumps(old), json.dumps(new)
