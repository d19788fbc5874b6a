import errno
import os

import pytest

from stores import cut_short, put_back
from transformers_moe_offload.disk_io import direct_reader
from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.system.host_memory import PAGE_BYTES

CONTENT = os.urandom(3 * PAGE_BYTES + 1234)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    try:
        direct_reader.DirectReader(path).read(0, 1)
    except OSError:
        pytest.skip("this filesystem refuses direct reads")
    return path


def read(file, start, stop):
    target = bytearray(stop - start)
    half = len(target) // 2
    view = memoryview(target)
    file.scatter_into([view[:half], view[half:]], start, past_cache=True)
    return bytes(target)


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 1), (0, 4096), (1, 4096), (4095, 4097), (100, 9000), (8192, 12288), (5000, len(CONTENT)), (0, len(CONTENT))],
)
def test_any_range_is_read_as_it_is(path, start, stop):
    assert read(File.now(path), start, stop) == CONTENT[start:stop]


def test_a_later_longer_read_gets_a_longer_buffer(path):
    file = File.now(path)
    assert read(file, 10, 20) == CONTENT[10:20]
    assert read(file, 10, 12000) == CONTENT[10:12000]
    assert read(file, 4000, 4100) == CONTENT[4000:4100]


def test_a_file_that_shrank_is_told(path):
    file = File.now(path)
    read(file, 0, 10)
    with put_back(path):
        cut_short(path, 5000)
        with pytest.raises(CheckpointError, match=r"(ends at byte|has) 5,000"):
            read(file, 100, 9000)
    assert read(file, 100, 9000) == CONTENT[100:9000]


def test_a_file_of_another_size_is_told(path):
    file = File.now(path)
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(CheckpointError, match=f"has {len(CONTENT) + 4:,} bytes, but had {len(CONTENT):,}"):
        read(file, 0, 10)


def test_a_file_that_is_gone_is_named(path):
    file = File.now(path)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match=r"cannot read .*weights\.bin: No such file"):
        read(file, 0, 10)
    path.with_name("elsewhere").rename(path)
    assert read(file, 0, 10) == CONTENT[:10]


@pytest.mark.parametrize("refusal", ["open", "read"])
def test_a_filesystem_that_refuses_is_read_through_the_page_cache(path, monkeypatch, refusal):
    def refuse(*arguments):
        raise OSError(errno.EINVAL, "Invalid argument")

    if refusal == "open":
        monkeypatch.setattr(direct_reader.DirectReader, "__init__", refuse)
    else:
        monkeypatch.setattr(direct_reader.DirectReader, "read", refuse)
    file = File.now(path)
    assert read(file, 100, 9000) == CONTENT[100:9000]
    monkeypatch.undo()
    assert read(file, 100, 9000) == CONTENT[100:9000]


def test_an_error_of_the_disk_is_not_taken_for_a_refusal(path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(direct_reader.DirectReader, "read", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        read(File.now(path), 100, 9000)
