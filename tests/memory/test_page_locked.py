"""Page-locked memory, asked of a runtime that says what it is told to."""

import gc

import pytest
import torch

from transformers_moe_offload.memory.page_locked import PORTABLE_AND_MAPPED, PageLockedBlock, pageable


class Runtime:
    """Of CUDA, what locks memory: it grants so many bytes."""

    def __init__(self, granted):
        self.granted = granted
        self.locked = {}

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
        assert flags == PORTABLE_AND_MAPPED
        if sum(self.locked.values()) + nbytes > self.granted:
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
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def test_a_block_is_all_locked_and_begins_at_a_page(runtime):
    block = PageLockedBlock(10_000)
    assert block.memory.nbytes == 10_000
    assert block.memory.data_ptr() % 4096 == 0
    assert runtime.locked == {block.memory.data_ptr(): 10_000}


def test_a_block_is_unlocked_once_when_it_is_freed(runtime):
    block = PageLockedBlock(10_000)
    block.free()
    assert runtime.locked == {}
    block.free()


def test_a_block_that_nobody_refers_to_is_unlocked(runtime):
    block = PageLockedBlock(10_000)
    kept = block.memory
    del block
    gc.collect()
    assert runtime.locked == {}
    assert kept.sum() == 0, "the memory itself is still there"


def test_a_refusal_says_how_much_was_asked_for_and_why(runtime):
    kept = PageLockedBlock(1 << 19)
    with pytest.raises(OSError, match=r"would not lock 1,048,576 bytes in memory: out of memory"):
        PageLockedBlock(1 << 20)
    assert runtime.locked == {kept.memory.data_ptr(): 1 << 19}


def test_pageable_memory_is_zeros():
    memory = pageable(5000)
    assert (memory.nbytes, int(memory.sum())) == (5000, 0)
    memory.fill_(1)
