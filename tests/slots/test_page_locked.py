"""Page-locked memory, asked of a runtime that says what it is told to."""

import ctypes
import gc

import pytest
import torch

from transformers_moe_offload.slots.cuda.page_locked import (
    PORTABLE_AND_MAPPED,
    SAME_ADDRESS,
    PageLock,
    pageable,
    why_not_readable,
)

GPU = torch.device("cuda", 0)


class Runtime:
    """Of CUDA, what locks memory: it grants so many bytes."""

    def __init__(self, granted):
        self.granted = granted
        self.locked = {}
        self.synchronized = []
        self.last_error = 0

    def install(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronized.append)
        monkeypatch.setattr(torch, "ones", self.launch)

    def launch(self, number, *, device):
        """A kernel of torch, which asks for the last error, whatever it was of; no later call gets it."""
        assert device == GPU
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error: {self.cudaGetErrorString(error)}")

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
        assert flags == PORTABLE_AND_MAPPED
        if sum(self.locked.values()) + nbytes > self.granted:
            self.last_error = 2
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.locked[address]
        return 0

    def cudaGetErrorString(self, error):  # noqa: N802
        return {2: "out of memory"}[error]


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime(granted=1 << 20)
    runtime.install(monkeypatch)
    return runtime


def locked(nbytes):
    memory = pageable(nbytes)
    return memory, PageLock(memory, GPU)


def test_memory_begins_at_a_page_is_zeros_and_can_be_written():
    memory = pageable(5000)
    assert memory.data_ptr() % 4096 == 0
    assert (memory.nbytes, int(memory.sum())) == (5000, 0)
    memory.fill_(1)


def test_all_of_it_is_locked(runtime):
    memory, lock = locked(10_000)
    assert runtime.locked == {memory.data_ptr(): 10_000}
    lock.free()


def test_it_is_unlocked_once_and_not_before_the_device_has_read_it(runtime):
    _, lock = locked(10_000)
    lock.free()
    assert runtime.locked == {}
    assert runtime.synchronized == [GPU]
    lock.free()
    assert runtime.synchronized == [GPU]


def test_it_is_unlocked_when_nobody_refers_to_the_lock_any_more(runtime):
    memory, lock = locked(10_000)
    del lock
    gc.collect()
    assert runtime.locked == {}
    assert memory.sum() == 0, "the memory itself is still there"


def test_a_refusal_says_how_much_was_asked_for_and_why(runtime):
    kept, _lock = locked(1 << 19)
    with pytest.raises(OSError, match=r"refused to page-lock 1,048,576 bytes: out of memory"):
        locked(1 << 20)
    assert runtime.locked == {kept.data_ptr(): 1 << 19}


def test_a_refusal_is_not_taken_for_a_failure_of_the_next_kernel(runtime):
    with pytest.raises(OSError, match="refused to page-lock"):
        locked(1 << 21)
    torch.ones(1, device=GPU)


def test_without_a_driver_no_gpu_can_read_it(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert why_not_readable(GPU) == "CUDA's driver was not found"


@pytest.mark.parametrize(
    ("error", "answer", "reason"),
    [(0, 1, None), (0, 0, "the GPU cannot read"), (1, 1, "does not say whether the GPU can read")],
)
def test_the_driver_is_asked_whether_the_gpu_can_read_it(monkeypatch, error, answer, reason):
    class Driver:
        is_ready = False

        def cuInit(self, flags):  # noqa: N802
            self.is_ready = flags == 0
            return 0

        def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
            assert (attribute, device) == (SAME_ADDRESS, 0)
            assert self.is_ready, "it answers no call before that"
            value._obj.value = answer
            return error

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    found = why_not_readable(GPU)
    assert (found is None) if reason is None else (reason in found)
