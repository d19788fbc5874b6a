"""Whether to read past the page cache is tried out on the files that will be read."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from stores import stacked_store
from transformers_moe_offload.disk_io import direct_reader
from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.store import direct_io_probe
from transformers_moe_offload.store.direct_io_probe import MOST_PAIRS, is_faster_past_cache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in the page cache")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def store(tmp_path, path):
    """Two layers of 16 experts of 128 KiB, none of them in the page cache."""
    store = stacked_store(tmp_path, {f"{layer}.w": torch.ones(16, 128, 256) for layer in range(2)})
    try:
        direct_reader.DirectReader(path).read(0, 1)
    except OSError:
        pytest.skip("this filesystem refuses direct reads")
    return store


def drop(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


class Disk:
    """Reads take as long as is said, by a clock that nothing else moves; counted."""

    def __init__(self, monkeypatch, *, past, through):
        self.reads = {"past": 0, "through": 0}
        self.seconds = 0.0
        monkeypatch.setattr(direct_io_probe, "time", SimpleNamespace(perf_counter=lambda: self.seconds))
        monkeypatch.setattr(File, "read_pages_into", self._slow("past", past, File.read_pages_into))
        monkeypatch.setattr(File, "read_into", self._slow("through", through, File.read_into))

    def _slow(self, way, seconds, really):
        def read(file, target, *rest):
            if len(target) > 1:
                self.reads[way] += 1
                self.seconds += seconds
            really(file, target, *rest)

        return read


def test_the_faster_way_is_chosen(store, path, monkeypatch):
    monkeypatch.setattr(direct_io_probe, "MOST_SECONDS", 1)
    for past, through, expected in [(0.0, 0.01, True), (0.01, 0.0, False)]:
        drop(path)
        with monkeypatch.context() as patch:
            disk = Disk(patch, past=past, through=through)
            assert is_faster_past_cache(store) is expected
            assert disk.reads == {"past": MOST_PAIRS, "through": MOST_PAIRS}


def test_where_both_are_about_as_fast_the_page_cache_is_left_alone(store, path, monkeypatch):
    monkeypatch.setattr(direct_io_probe, "MOST_SECONDS", 1)
    drop(path)
    Disk(monkeypatch, past=0.03, through=0.03)
    assert is_faster_past_cache(store)


def test_a_slow_disk_is_not_asked_for_long(store, path, monkeypatch):
    drop(path)
    disk = Disk(monkeypatch, past=0.03, through=0.03)
    is_faster_past_cache(store)
    assert disk.reads == {"past": 1, "through": 1}, "0.06 s: no further pair begins"


def test_what_is_in_the_page_cache_tells_nothing_and_is_not_read(store, path, monkeypatch):
    path.read_bytes()
    disk = Disk(monkeypatch, past=0, through=0)
    assert is_faster_past_cache(store)
    assert disk.reads == {"past": 0, "through": 0}


def test_a_filesystem_that_refuses_is_read_through_the_page_cache(store, path, monkeypatch):
    drop(path)

    def refuse(*arguments):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(direct_reader.DirectReader, "__init__", refuse)
    assert not is_faster_past_cache(store)
