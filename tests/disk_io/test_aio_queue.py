"""Experts that the kernel reads on its own arrive whole, or it is told why not."""

import ctypes
import errno
import gc
import os
import threading

import pytest

from stores import cut_short, put_back
from transformers_moe_offload.disk_io import aio_queue, direct_reader
from transformers_moe_offload.disk_io.aio_queue import AT_ONCE, MOST_BYTES, MOST_READS, AioQueue
from transformers_moe_offload.disk_io.file import File, FileRange
from transformers_moe_offload.disk_io.page_reads import placed
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.system.host_memory import PAGE_BYTES, PageMemory

NUM_PAGES = 64
CONTENT = os.urandom(NUM_PAGES * PAGE_BYTES + 1234)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    try:
        AioQueue()
        direct_reader.DirectReader(path).read(0, 1)
    except OSError as error:
        pytest.skip(f"no asynchronous reads here: {error}")
    return path


class Reads:
    """A queue, and memory for what it reads."""

    def __init__(self, path):
        self.file = File.now(path)
        self.queue = AioQueue()
        self.memory = PageMemory()

    def start(self, start, stop):
        """Begin to read a range of the file."""
        place = placed([FileRange(self.file, start, stop)])
        slot = self.memory.take(place.nbytes)
        begins = place.offsets[0]
        return self.queue.start(place.reads, slot, lambda: stop - start), slot[begins : begins + stop - start]


@pytest.fixture
def reads(path):
    return Reads(path)


def as_bytes(memory):
    return memory.numpy().tobytes()


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (4095, 4097), (100, 50_000), (8192, 12288), (5000, len(CONTENT))])
def test_any_range_arrives_as_it_is(reads, start, stop):
    expert, found = reads.start(start, stop)
    assert expert.finish() == stop - start
    assert expert.is_done()
    assert as_bytes(found) == CONTENT[start:stop]


def test_many_experts_arrive_whatever_order_they_are_waited_for_in(reads):
    wanted = [(page * PAGE_BYTES + 8, (page + 2) * PAGE_BYTES) for page in range(60)] * 4
    assert len(wanted) > MOST_READS
    coming = [(reads.start(*span), span) for span in wanted]
    for (expert, found), (start, stop) in reversed(coming):
        expert.finish()
        assert as_bytes(found) == CONTENT[start:stop]


def test_looking_is_enough_for_an_expert_to_arrive(reads):
    expert, found = reads.start(8, 9000)
    while not expert.is_done():
        pass
    assert as_bytes(found) == CONTENT[8:9000]


@pytest.fixture
def slow_disk(monkeypatch):
    """One whose reads end when they are waited for, and not before."""
    ended = aio_queue.AsyncReads.ended
    monkeypatch.setattr(aio_queue.AsyncReads, "ended", lambda self, least: ended(self, least) if least else [])


def test_an_expert_that_the_kernel_was_not_told_of_can_be_given_up(reads, slow_disk, monkeypatch):
    monkeypatch.setattr(aio_queue, "MOST_BYTES", 1)
    first, found = reads.start(0, 20_000)
    second, _ = reads.start(20_000, 30_000)
    assert second.cancel()
    assert not first.cancel()
    first.finish()
    assert as_bytes(found) == CONTENT[:20_000]
    third, found = reads.start(30_000, 40_000)
    third.finish()
    assert as_bytes(found) == CONTENT[30_000:40_000]


def test_the_kernel_is_told_of_no_more_than_keeps_a_disk_busy(reads, slow_disk):
    coming = [reads.start(0, NUM_PAGES * PAGE_BYTES)[0] for _ in range(2 + MOST_BYTES // (NUM_PAGES * PAGE_BYTES))]
    assert coming[-1].cancel()
    for expert in coming[:-1]:
        expert.finish()


def test_a_file_that_shrank_is_told_by_whoever_waits(reads, path):
    reads.start(0, 100)[0].finish()
    with put_back(path):
        cut_short(path, 5000)
        expert, _ = reads.start(100, 9000)
        with pytest.raises(CheckpointError, match=r"(ends at byte|has) 5,000"):
            expert.finish()
    expert, found = reads.start(100, 9000)
    expert.finish()
    assert as_bytes(found) == CONTENT[100:9000]


def test_a_file_that_is_gone_is_named(reads, path):
    path.rename(path.with_name("elsewhere"))
    expert, _ = reads.start(0, 10)
    with pytest.raises(CheckpointError, match=r"cannot read .*weights\.bin: No such file"):
        expert.finish()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EAGAIN])
def test_what_the_kernel_refuses_is_read_by_whoever_waits(reads, monkeypatch, code):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(aio_queue.AsyncReads, "submit", refuse)
    expert, found = reads.start(100, 9000)
    assert expert.finish() == 8900
    assert as_bytes(found) == CONTENT[100:9000]


def test_a_filesystem_without_direct_reads_is_read_through_the_page_cache(reads, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(direct_reader.DirectReader, "__init__", refuse)
    expert, found = reads.start(100, len(CONTENT))
    expert.finish()
    assert as_bytes(found) == CONTENT[100:]


@pytest.mark.parametrize("method", ["ended", "submit"])
def test_an_interruption_loses_no_expert(reads, monkeypatch, method):
    """Ctrl-C between two lines: what is under way ends, and is read again if it is still wanted."""
    coming = [reads.start(number * 5000, 30_000 + number * 5000) for number in range(3)]
    really, calls = getattr(aio_queue.AsyncReads, method), []

    def interrupted(*arguments):
        found = really(*arguments)
        if not calls:
            calls.append(method)
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(aio_queue.AsyncReads, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        reads.start(50_000, 60_000)[0].finish()
    coming.append(reads.start(15_000, 45_000))
    for number, (expert, found) in enumerate(coming):
        assert expert.finish() == 30_000
        assert as_bytes(found) == CONTENT[number * 5000 : 30_000 + number * 5000]


class ReadsAtOnce:
    """A system that reads while it is told to, as some do."""

    def __init__(self, most):
        self._ended = []

    def submit(self, key, descriptor, offset, address, nbytes):
        target = (ctypes.c_char * nbytes).from_address(address)
        self._ended.append((key, os.preadv(descriptor, [target], offset)))

    def ended(self, at_least):
        ended, self._ended = self._ended, []
        return ended


def test_a_system_that_reads_while_it_is_told_to_is_noticed(path, monkeypatch):
    monkeypatch.setattr(aio_queue, "AsyncReads", ReadsAtOnce)
    reads = Reads(path)
    for number in range(AT_ONCE):
        assert not reads.queue.is_synchronous
        expert, found = reads.start(number, 9000)
        expert.finish()
        assert as_bytes(found) == CONTENT[number:9000]
    assert reads.queue.is_synchronous


def test_two_threads_can_wait_at_once(reads):
    found = {}

    def read(number):
        for page in range(number, NUM_PAGES - 2, 2):
            expert, memory = reads.start(page * PAGE_BYTES + 16, (page + 2) * PAGE_BYTES)
            expert.finish()
            found[page] = as_bytes(memory)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == NUM_PAGES - 2
    assert all(found[page] == CONTENT[page * PAGE_BYTES + 16 : (page + 2) * PAGE_BYTES] for page in found)


def test_a_forked_process_reads_for_itself(reads):
    expert, found = reads.start(100, 9000)
    from_child, to_parent = os.pipe()
    if os.fork() == 0:
        try:
            expert.finish()
            later, also_found = reads.start(9000, 20_000)
            later.finish()
            os.write(to_parent, as_bytes(found) + as_bytes(also_found))
        finally:
            os._exit(0)
    os.close(to_parent)
    with open(from_child, "rb") as stream:
        assert stream.read() == CONTENT[100:20_000]
    expert.finish()
    assert as_bytes(found) == CONTENT[100:9000]


def test_a_queue_ends_only_when_its_reads_have(path):
    reads = Reads(path)
    memory = [reads.start(0, NUM_PAGES * PAGE_BYTES)[1] for _ in range(8)]
    del reads
    gc.collect()
    assert all(as_bytes(piece) == CONTENT[: NUM_PAGES * PAGE_BYTES] for piece in memory)
