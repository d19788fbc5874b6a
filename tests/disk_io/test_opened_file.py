"""A thousand files need not be open at once."""

import resource
import threading

import pytest

from stores import numbered_store
from transformers_moe_offload.disk_io import file as file_module
from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.disk_io.opened_file import OpenFiles, default_limit
from transformers_moe_offload.store import expert_store


@pytest.fixture
def files(tmp_path):
    found = []
    for number in range(12):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * 10)
        found.append(File.now(path))
    return found


@pytest.fixture
def three(monkeypatch):
    registry = OpenFiles(3)
    monkeypatch.setattr(file_module, "OPEN_FILES", registry)
    return registry


def num_open(files):
    return sum(file._opened is not None or file._map is not None for file in files)


def read(file, number):
    target = bytearray(10)
    file.read_into(memoryview(target), 0)
    assert set(target) == {number}


@pytest.mark.usefixtures("three")
def test_the_file_that_was_opened_first_is_closed_first_and_opened_again(files):
    for _ in range(2):
        for number, file in enumerate(files):
            read(file, number)
            assert num_open(files) <= 3
    assert [file._opened is not None for file in files[-4:]] == [False, True, True, True]


@pytest.mark.usefixtures("three")
def test_what_is_mapped_stays_usable_after_its_file_was_closed(files):
    maps = [file.mapped() for file in files]
    assert num_open(files) == 3
    assert [int(one.bytes[5]) for one in maps] == list(range(12))


@pytest.mark.usefixtures("three")
def test_threads_that_read_many_files_get_what_is_in_them(files):
    errors = []

    def work():
        try:
            for _ in range(50):
                for number, file in enumerate(files):
                    read(file, number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)


def test_a_file_that_is_gone_takes_no_place(three, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"x" * 10)
    for _ in range(10):
        read(File.now(path), ord("x"))
    kept = File.now(path)
    read(kept, ord("x"))
    assert kept._opened is not None


def test_half_of_what_the_system_allows_is_left_to_others():
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 8 <= default_limit() <= max(8, allowed // 2)


def test_experts_in_more_files_than_may_be_open_are_not_mapped(tmp_path, monkeypatch):
    assert numbered_store(tmp_path, 1, 2).can_be_mapped
    monkeypatch.setattr(expert_store, "OPEN_FILES", OpenFiles(0))
    assert not numbered_store(tmp_path, 1, 2).can_be_mapped
