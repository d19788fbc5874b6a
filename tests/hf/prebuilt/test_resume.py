"""However writing ends, the folder is resumed to the same bytes, and no foreign file is touched."""

import multiprocessing
import random
import signal
import time

import pytest

from forked import with_locks_of_its_own
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.prebuilt.layout import MARKS
from transformers_moe_offload.hf.prebuilt.names import INDEX_NAME, RECIPE_NAME
from transformers_moe_offload.output.claim import is_complete
from transformers_moe_offload.output.place import place_for
from transformers_moe_offload.tensor_files.checksum import check_file

from .made import RECIPE, files, prebuilt, record, write

OTHER_RECIPE = RECIPE | {"experts": {"default": {"nbits": 2}}}


@pytest.fixture
def expected(tmp_path):
    write(tmp_path / "undisturbed")
    return files(tmp_path / "undisturbed")


def stop_after(count: int):
    """Content that fails at some expert."""
    seen = []

    def read(number, expert):
        seen.append(expert)
        if len(seen) > count:
            raise RuntimeError("stopped")
        return record(number, expert)

    return prebuilt(read=read)


def interrupt(folder, count: int = 12, **options):
    with pytest.raises(RuntimeError, match="stopped"):
        write(folder, stop_after(count), **options)


# Killed.


def slow(number, expert):
    time.sleep(0.004)
    return record(number, expert)


def write_slowly(folder, is_ready, options):
    is_ready.set()
    write(folder, prebuilt(read=slow), **options)


@pytest.fixture(scope="module")
def span(tmp_path_factory) -> float:
    """Seconds that an undisturbed run takes: within them lie the moments to kill one."""
    start = time.perf_counter()
    write(tmp_path_factory.mktemp("timed"), prebuilt(read=slow))
    return time.perf_counter() - start


def run_and_kill(folder, seconds, **options) -> bool:
    """Whether the child was still at it."""
    context = multiprocessing.get_context("fork")
    is_ready = context.Event()
    child = context.Process(target=with_locks_of_its_own, args=(write_slowly, folder, is_ready, options))
    child.start()
    assert is_ready.wait(120)
    child.join(seconds)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def test_killed_at_any_moment_it_is_unloadable_or_whole_and_resumes_to_the_same_bytes(tmp_path, expected, span):
    moments = random.Random(0)
    killed = 0
    for trial in range(20):
        folder = tmp_path / str(trial)
        killed += run_and_kill(folder, moments.uniform(0, span))
        if is_complete(folder, MARKS):
            assert files(folder) == expected
            continue
        assert not list(folder.glob("model*.safetensors*"))
        for shard in folder.glob("*.safetensors"):
            check_file(shard)
        write(folder)
        assert files(folder) == expected
    assert killed > 0


def test_killed_while_it_replaces_a_checkpoint_the_old_or_the_new_one_is_there(tmp_path, expected, span):
    moments = random.Random(1)
    folder = tmp_path / "folder"
    write(folder, recipe=OTHER_RECIPE)
    old = files(folder)
    for _ in range(8):
        run_and_kill(folder, moments.uniform(0, span), overwrite=True)
        with pytest.raises(CheckpointError, match="holds a complete checkpoint"):
            write(folder)
        assert files(folder) in (old, expected)
    write(folder, overwrite=True)
    assert files(folder) == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "undisturbed"]


# Resumed.


def test_finished_layers_are_not_encoded_again(tmp_path, expected):
    interrupt(tmp_path / "folder", count=12)
    encoded = []

    def watched(number, expert):
        encoded.append((number, expert))
        return record(number, expert)

    write(tmp_path / "folder", prebuilt(read=watched))
    assert {number for number, _ in encoded} == {2}
    assert files(tmp_path / "folder") == expected


@pytest.mark.parametrize("place", [5000, -1])
def test_a_finished_shard_that_was_damaged_since_is_written_again(tmp_path, expected, place, caplog):
    interrupt(tmp_path / "folder", count=12)
    shard = tmp_path / "folder" / "moe_offload-00001-of-00004.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[place] ^= 4
    shard.write_bytes(damaged)
    write(tmp_path / "folder")
    assert f"writing {shard} again" in caplog.text
    assert files(tmp_path / "folder") == expected


def test_what_a_killed_process_had_half_written_is_removed(tmp_path, expected):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{RECIPE_NAME}.partial").write_text("{")
    (folder / "moe_offload-00001-of-00004.safetensors.partial").write_bytes(b"half")
    write(folder)
    assert files(folder) == expected


# Refused.


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"is not empty \(it has thesis\.tex\)"):
            write(tmp_path, overwrite=overwrite)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_an_unfinished_checkpoint_by_another_recipe_is_refused_with_the_difference(tmp_path):
    interrupt(tmp_path)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"its experts\.default\.nbits is 4, and now it is 2"):
        write(tmp_path, recipe=OTHER_RECIPE)
    assert files(tmp_path) == before


def test_a_complete_checkpoint_is_refused_unless_it_is_to_be_overwritten(tmp_path, expected):
    write(tmp_path / "folder", recipe=OTHER_RECIPE)
    old = files(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"holds a complete checkpoint; .*overwrite=True"):
        write(tmp_path / "folder")
    assert files(tmp_path / "folder") == old
    write(tmp_path / "folder", overwrite=True)
    assert files(tmp_path / "folder") == expected


def test_while_one_is_being_overwritten_it_stays_as_it_was(tmp_path, expected):
    write(tmp_path / "folder", recipe=OTHER_RECIPE)
    old = files(tmp_path / "folder")
    interrupt(tmp_path / "folder", overwrite=True)
    assert files(tmp_path / "folder") == old
    write(tmp_path / "folder", overwrite=True)
    assert files(tmp_path / "folder") == expected


def test_an_overwriting_by_a_recipe_that_was_given_up_leaves_no_trace(tmp_path, expected):
    write(tmp_path / "folder")
    interrupt(tmp_path / "folder", recipe=OTHER_RECIPE, overwrite=True)
    write(tmp_path / "folder", recipe=RECIPE | {"dense": {"nbits": 8}}, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "undisturbed"]


def test_a_change_of_places_that_was_cut_short_is_finished(tmp_path, expected):
    write(tmp_path / "folder", recipe=OTHER_RECIPE)
    write(tmp_path / "new")
    (tmp_path / ".folder.old").mkdir()
    (tmp_path / ".folder.old" / "moe_offload.replaced").write_text("")
    (tmp_path / "folder").rename(tmp_path / ".folder.old" / "checkpoint")
    (tmp_path / "new").rename(tmp_path / ".folder.new")
    with pytest.raises(CheckpointError, match="holds a complete checkpoint"):
        write(tmp_path / "folder")
    assert files(tmp_path / "folder") == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "undisturbed"]


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    with place_for(tmp_path, RECIPE, MARKS), pytest.raises(CheckpointError, match="another process is writing to"):
        write(tmp_path)
    assert not (tmp_path / INDEX_NAME).exists()


def test_a_place_that_cannot_be_a_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file"):
        write(tmp_path / "file" / "folder")
