import copy
import gc
import os
import pickle
import random
import threading
import time
from pathlib import Path

import pytest

from stores import put_back, unopened
from transformers_moe_offload.disk_io import opened_file
from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.errors import CheckpointError

CONTENT = bytes(range(200)) * 50

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def file(path):
    return File.now(path)


def read(file, offset, count):
    target = bytearray(count)
    file.read_into(memoryview(target), offset)
    return bytes(target)


def descriptors(path):
    """How many descriptors of this process are open on the path."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found += fd.readlink() == path
        except OSError:  # the descriptor of the listing itself
            continue
    return found


@pytest.mark.parametrize(("offset", "count"), [(0, 1), (0, 10000), (9999, 1), (1234, 777), (10000, 0), (5, 0)])
def test_exactly_the_bytes_asked_for_are_read(file, offset, count):
    assert read(file, offset, count) == CONTENT[offset : offset + count]


def test_nothing_beyond_the_target_is_written(file):
    around = bytearray(b"x" * 30)
    file.read_into(memoryview(around)[10:20], 0)
    assert around == b"x" * 10 + CONTENT[:10] + b"x" * 10


def test_making_a_file_opens_nothing(tmp_path):
    unopened(tmp_path / "never made", 5)


def test_a_read_past_the_end_names_the_end_and_what_was_wanted(file):
    with pytest.raises(CheckpointError, match=r"ends at byte 10,000, but .* reach to byte 10,001"):
        read(file, 9990, 11)


def test_a_file_cut_short_after_it_was_opened_is_an_error_and_not_zeros(file, path):
    read(file, 0, 10)
    os.truncate(path, 6000)
    with pytest.raises(CheckpointError, match=r"(ends at byte|has) 6,000"):
        read(file, 5000, 2000)


def test_a_file_of_another_size_names_both_sizes(file, path):
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(CheckpointError, match=r"has 9,999 bytes, but had 10,000; it was written"):
        read(file, 0, 1)


def test_a_file_that_vanished_is_named(file, path):
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*weights\.bin: No such file"):
        read(file, 0, 1)


def test_a_folder_in_place_of_the_file_is_an_error_of_ours(file, path):
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot read"):
        read(file, 0, 1)


def test_a_file_that_was_opened_before_it_vanished_is_still_read(file, path):
    read(file, 0, 1)
    path.unlink()
    assert read(file, 100, 50) == CONTENT[100:150]


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b""), lambda p: os.truncate(p, 99)])
@pytest.mark.parametrize("was_open", [False, True])
def test_a_file_that_is_what_it_was_again_works_again(file, path, damage, was_open):
    if was_open:
        read(file, 0, 1)
    with put_back(path):
        damage(path)
        with pytest.raises(CheckpointError):
            read(file, 5000, 1000)
    assert read(file, 5000, 1000) == CONTENT[5000:6000]


def test_a_file_that_moved_works_again_when_it_is_back(file, path):
    path.rename(path.with_name("elsewhere"))
    path.write_bytes(CONTENT)
    with pytest.raises(CheckpointError, match=r"is not what it was when the model was loaded: .* is inode"):
        read(file, 5000, 1000)
    path.with_name("elsewhere").replace(path)
    assert read(file, 5000, 1000) == CONTENT[5000:6000]


OTHER = bytes(reversed(CONTENT))


def write_in_place(path):
    path.write_bytes(OTHER)


def replace_in_the_same_instant(path):
    was = path.stat()
    path.with_name("other").write_bytes(OTHER)
    os.utime(path.with_name("other"), ns=(was.st_atime_ns, was.st_mtime_ns))
    path.with_name("other").replace(path)


def lead_elsewhere(path):
    path.with_name("other").write_bytes(OTHER)
    path.unlink()
    path.symlink_to("other")


@pytest.mark.parametrize("change", [write_in_place, replace_in_the_same_instant, lead_elsewhere])
@pytest.mark.parametrize("way", ["read", "past the cache", "pages", "mapped", "announced", "cached"])
def test_another_file_of_the_same_size_is_never_read(file, path, change, way):
    change(path)
    page = bytearray(4096)
    ways = {
        "read": lambda: read(file, 0, 10),
        "past the cache": lambda: file.scatter_into([memoryview(page)], 0, past_cache=True),
        "pages": lambda: file.read_pages_into(memoryview(page), 0, 4096),
        "mapped": file.mapped,
    }
    if way in ways:
        with pytest.raises(CheckpointError, match=r"weights\.bin is not what it was when the model was loaded"):
            ways[way]()
    elif way == "announced":
        assert not file.announce(0, 10)
    else:
        assert not file.scatter_cached_into([memoryview(page)], 0)
    assert page == bytes(4096)


@pytest.mark.parametrize("change", [replace_in_the_same_instant, lead_elsewhere])
def test_what_is_open_is_read_on_in_every_way_whatever_its_path_leads_to(file, path, change):
    read(file, 0, 1)
    change(path)
    page = bytearray(4096)
    file.scatter_into([memoryview(page)], 0, past_cache=True)
    assert page == CONTENT[:4096]
    assert bytes(file.mapped().bytes[:4096].numpy()) == CONTENT[:4096]


@pytest.mark.parametrize("change", [write_in_place, lambda path: os.truncate(path, 99)])
def test_a_file_that_was_written_to_while_it_is_open_is_told_at_once_when_it_is_mapped(file, path, change):
    read(file, 0, 1)
    change(path)
    with pytest.raises(CheckpointError, match="was written at"):
        file.mapped()


def test_a_file_that_is_written_to_while_it_is_open_is_told_soon(file, path):
    read(file, 0, 1)
    write_in_place(path)
    time.sleep(2 * opened_file.LOOK_EVERY)
    with pytest.raises(CheckpointError, match="was written at"):
        read(file, 0, 1)


def test_a_relative_path_leads_where_it_did_after_the_working_directory_changes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = File.now(Path(path.name))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / path.name).write_bytes(OTHER)
    monkeypatch.chdir(tmp_path / "inner")
    assert read(file, 0, 10) == CONTENT[:10]


def test_many_threads_read_at_once_without_disturbing_each_other(file):
    wrong, start = [], threading.Barrier(8)

    def run(seed):
        choose = random.Random(seed)
        start.wait()
        for i in range(200):
            offset = choose.randrange(9000)
            if read(file, offset, 1000) != CONTENT[offset : offset + 1000]:
                wrong.append(offset)
            if i % 20 == seed:
                file.close()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_proc
def test_all_reads_share_one_descriptor(file, path):
    for offset in range(5):
        read(file, offset, 10)
    assert descriptors(path) == 1


@needs_proc
def test_the_descriptor_is_closed_with_the_last_user_of_the_file(path):
    file = File.now(path)
    twin = copy.deepcopy(file)
    read(file, 0, 1)
    read(twin, 0, 1)
    del file
    gc.collect()
    assert descriptors(path) == 1
    del twin
    gc.collect()
    assert descriptors(path) == 0


@needs_proc
def test_closing_lets_the_descriptor_go_and_the_next_read_opens_it_again(file, path):
    read(file, 0, 1)
    file.close()
    assert descriptors(path) == 0
    assert read(file, 3, 4) == CONTENT[3:7]
    assert descriptors(path) == 1


@needs_proc
@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 10), lambda p: p.write_bytes(CONTENT + b"more")])
def test_a_failed_read_leaves_no_descriptor_behind(path, damage):
    file = File.now(path)
    damage(path)
    for _ in range(3):
        with pytest.raises(CheckpointError):
            read(file, 0, 10)
    gc.collect()
    assert descriptors(path) == 0


def test_a_copy_of_a_model_shares_its_files(file):
    assert copy.deepcopy({"a": file, "b": file}) == {"a": file, "b": file}


def test_a_pickled_file_knows_what_it_was(file, path):
    pickled = pickle.dumps(file)
    write_in_place(path)
    with pytest.raises(CheckpointError, match="was written at"):
        read(pickle.loads(pickled), 0, 1)


def test_a_file_that_is_open_can_be_pickled_and_opens_for_itself(file):
    read(file, 0, 1)
    other = pickle.loads(pickle.dumps(file))
    assert other is not file
    assert read(other, 7, 9) == CONTENT[7:16]
