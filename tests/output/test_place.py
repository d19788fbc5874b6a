"""A place beside the one where a checkpoint is to be: nothing is to be seen of it before it is complete."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.output.claim import Marks
from transformers_moe_offload.output.place import expect_place, place_for, recover, replacing
from transformers_moe_offload.tensor_files.writer import PARTIAL, SafetensorsWriter, write_text

MARKS = Marks(first="made_by.json", last="config.json", is_in_place=False)
RECIPE = {"experts": 4, "source": {"revision": "a"}}
OTHER = {"experts": 8, "source": {"revision": "a"}}


class FailedCheckError(Exception):
    """What a checkpoint is given up for."""


def write(folder, recipe=RECIPE, stop: Exception | None = None, **options) -> list[str]:
    """What an earlier attempt had left; writes two files."""
    with place_for(folder, recipe, MARKS, **options) as place:
        found = names(place)
        assert not (folder / MARKS.last).exists() or options.get("overwrite")
        (place / "weights").write_text(str(recipe))
        if stop is not None:
            raise stop
        (place / MARKS.last).write_text("{}")
    return found


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


COMPLETE = ["config.json", "made_by.json", "weights"]


def test_a_checkpoint_appears_when_it_is_complete_and_nothing_stays_beside_it(folder):
    write(folder)
    assert names(folder) == COMPLETE
    assert names(folder.parent) == ["out"]


def test_an_empty_folder_that_is_there_is_used(folder):
    folder.mkdir()
    write(folder)
    assert names(folder) == COMPLETE


def test_an_attempt_that_was_interrupted_is_gone_on_with(folder):
    with pytest.raises(RuntimeError):
        write(folder, stop=RuntimeError())
    assert not folder.exists()
    assert write(folder) == ["made_by.json", "weights"]


@pytest.mark.parametrize(("recipe", "options"), [(OTHER, {}), (RECIPE, {"resume": False})])
def test_an_attempt_by_another_recipe_or_that_is_not_to_be_resumed_is_removed(folder, recipe, options):
    with pytest.raises(RuntimeError):
        write(folder, stop=RuntimeError())
    assert write(folder, recipe, **options) == ["made_by.json"]


def test_what_fails_a_check_is_removed(folder):
    with pytest.raises(FailedCheckError):
        write(folder, stop=FailedCheckError(), discards=(FailedCheckError,))
    assert names(folder.parent) == []


class Killed(BaseException):
    """In place of a signal that ends the process."""


REMOVALS = {
    "another recipe": lambda folder: write(folder, OTHER),
    "not resumed": lambda folder: write(folder, resume=False),
    "failed a check": lambda folder: write(folder, stop=FailedCheckError(), discards=(FailedCheckError,)),
}


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("remove", REMOVALS.values(), ids=REMOVALS)
def test_a_kill_while_an_attempt_is_removed_leaves_a_folder_that_is_used_again(
    folder, remove, is_reversed, monkeypatch
):
    beside, unlink, entries = folder.with_name(f".{folder.name}.new"), Path.unlink, Path.iterdir
    # Folders list their files in any order.
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(entries(path), reverse=is_reversed)))
    for num_removed in range(5):
        with pytest.raises(RuntimeError):
            write(folder, stop=RuntimeError())
        for name in ("a", "z"):
            (beside / name).write_text(name)
        moments = iter(range(num_removed))

        def dying(path, *args, moments=moments, **options):
            if path.parent == beside and path.exists() and next(moments, None) is None:
                raise Killed
            unlink(path, *args, **options)

        with monkeypatch.context() as patch, suppress(Killed, FailedCheckError):
            patch.setattr(Path, "unlink", dying)
            remove(folder)
        write(folder, overwrite=True, resume=False)
        assert names(folder) == COMPLETE
        assert names(folder.parent) == ["out"]
        shutil.rmtree(folder)


def test_what_fails_a_check_leaves_the_checkpoint_that_was_there(folder):
    write(folder)
    with pytest.raises(FailedCheckError):
        write(folder, OTHER, stop=FailedCheckError(), discards=(FailedCheckError,), overwrite=True)
    assert (folder / "weights").read_text() == str(RECIPE)
    assert names(folder.parent) == ["out"]


def test_a_checkpoint_is_replaced_only_if_that_was_asked_for(folder):
    write(folder)
    with pytest.raises(CheckpointError, match="holds a complete checkpoint"):
        write(folder, OTHER)
    write(folder, OTHER, overwrite=True)
    assert (folder / "weights").read_text() == str(OTHER)


def test_a_checkpoint_of_somebody_else_is_never_replaced(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"is not empty \(it has config\.json\)"):
            write(folder, overwrite=overwrite)
    assert names(folder) == ["config.json"]


def test_a_file_in_the_place_of_the_folder_is_an_error_before_anything_is_written(folder):
    folder.write_text("mine")
    with pytest.raises(CheckpointError, match="is a file; name a folder"):
        expect_place(folder, MARKS)
    assert names(folder.parent) == ["out"]


def test_two_processes_do_not_write_to_one_place_whatever_their_recipes(folder):
    with place_for(folder, RECIPE, MARKS) as place:
        (place / MARKS.last).write_text("{}")
        with pytest.raises(CheckpointError, match="another process is writing to"):
            write(folder, OTHER)
        assert names(place) == ["config.json", "made_by.json"]
    assert names(folder) == ["config.json", "made_by.json"]


def die_while_renaming(folder, at: int) -> None:
    """Dies before the rename number `at` of those with which places are changed."""
    rename, seen = os.rename, []

    def counted(*args, **options):
        seen.append(args)
        if len(seen) > at:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(*args, **options)

    os.rename = counted
    write(folder, OTHER, overwrite=True)


@pytest.mark.parametrize(("at", "survivor"), [(0, RECIPE), (1, OTHER)])
def test_a_change_of_places_that_a_kill_cut_short_is_taken_back_or_finished(folder, at, survivor):
    write(folder)
    child = multiprocessing.get_context("fork").Process(target=die_while_renaming, args=(folder, at))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    recover(folder, MARKS)
    assert (folder / "weights").read_text() == str(survivor)
    assert write(folder, overwrite=True) is not None
    assert names(folder.parent) == ["out"]


def test_a_change_of_places_that_fails_says_where_the_checkpoint_is(folder, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"complete in .*\.out\.new, but cannot be moved to .*Permission denied"):
        write(folder)
    assert names(folder.parent / ".out.new") == COMPLETE


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_recipe_that_is_no_json_is_an_error_of_ours(content, folder):
    folder.mkdir()
    (folder / MARKS.first).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"delete .* and start again") as refused:
        expect_place(folder, replace(MARKS, is_in_place=True))
    assert len(str(refused.value)) < 700


def test_a_recipe_of_something_else_is_quoted_no_longer_than_a_line(folder):
    folder.mkdir()
    (folder / "made_by.json").write_text(json.dumps({"experts": ["a" * 100_000]}))
    in_place = Marks(first="made_by.json", last="config.json")
    with pytest.raises(CheckpointError, match="by another recipe") as refused, place_for(folder, RECIPE, in_place):
        pass
    assert len(str(refused.value)) < 800


@pytest.mark.parametrize("name", [".out.new", ".out.old"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_neighbour_that_is_not_ours_is_never_touched(folder, name, overwrite):
    if overwrite:
        write(folder)
    neighbour = folder.parent / name
    neighbour.mkdir()
    (neighbour / "thesis.txt").write_text("the only copy")
    with pytest.raises(CheckpointError, match=rf"{name} was not made by this package"):
        expect_place(folder, MARKS, overwrite=overwrite)
    with pytest.raises(CheckpointError, match=rf"{name} was not made by this package"):
        write(folder, OTHER, overwrite=overwrite)
    with pytest.raises(CheckpointError, match=rf"{name} was not made by this package"):
        write(folder, OTHER, resume=False, overwrite=overwrite)
    recover(folder, MARKS)
    assert (neighbour / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("name", [".out.new", ".out.old"])
def test_a_neighbour_that_is_a_link_is_never_followed(folder, name):
    write(folder)
    elsewhere = folder.parent / "elsewhere"
    write(elsewhere)
    (elsewhere / "moe_offload.replaced").write_text("")
    (folder.parent / name).symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(CheckpointError, match=rf"{name} was not made by this package"):
        write(folder, OTHER, overwrite=True)
    recover(folder, MARKS)
    assert names(elsewhere) == [*COMPLETE[:2], "moe_offload.replaced", "weights"]
    assert (folder / "weights").read_text() == str(RECIPE)


def test_a_folder_with_half_a_download_in_it_is_not_empty(folder):
    folder.mkdir()
    (folder / "film.mkv.partial").write_text("half")
    in_place = Marks(first=MARKS.first, last=MARKS.last)
    with pytest.raises(CheckpointError, match=r"is not empty \(it has film\.mkv\.partial\)"):
        write_in_place(folder, in_place)
    assert names(folder) == ["film.mkv.partial"]


def test_saving_into_a_folder_of_others_leaves_their_half_written_files(folder):
    folder.mkdir()
    (folder / "film.mkv.partial").write_text("half")
    (folder / "moe_offload-1.partial").write_text("half")
    with replacing(folder, RECIPE, Marks(first="moe_offload.json", last="moe_offload.index", prefix="moe_offload")):
        pass
    assert names(folder) == ["film.mkv.partial", "moe_offload.json"]


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to_with_a_warning(folder, monkeypatch, caplog, code):
    def refuse(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(folder)
    assert names(folder) == COMPLETE
    assert "cannot be locked" in caplog.text


def test_a_temporary_name_that_is_a_link_is_not_written_through(folder):
    folder.mkdir()
    victim = folder / "victim"
    victim.write_text("mine")
    for name in ("text", "tensors"):
        (folder / f"{name}{PARTIAL}").symlink_to(victim)
    write_text(folder / "text", "written")
    with SafetensorsWriter(folder / "tensors", [FieldSpec("one", (1,), "float32")]) as writer:
        writer.write("one", torch.zeros(1))
    assert victim.read_text() == "mine"
    assert names(folder) == ["tensors", "text", "victim"]


def write_in_place(folder, marks) -> None:
    with place_for(folder, RECIPE, marks) as place:
        (place / marks.last).write_text("{}")


@pytest.mark.parametrize("name", [".out.new", ".out.old"])
def test_an_empty_neighbour_is_used(folder, name):
    (folder.parent / name).mkdir()
    write(folder)
    assert names(folder.parent) == ["out"]
