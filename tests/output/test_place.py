"""A place beside the one where a checkpoint is to be: nothing is to be seen of it before it is complete."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.output.place import Marks, expect_place, place_for, recover

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
