"""Products of all sizes share one team of threads, which is torch's."""

import os
import sys

import pytest
import torch

from transformers_moe_offload.kernels import cpu, native

from .matrices import random_matrix, random_rows


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux" or native.library() is None, reason="threads are listed in /proc")
def test_a_product_that_wants_fewer_threads_ends_none(four_threads):
    matrix, rows = random_matrix(2048, 512), random_rows(1, 512)
    alone = cpu.linear_each(rows, [1], [matrix], threads=1)
    torch.ones(1 << 22).sum()  # torch has started them all
    cpu.linear_each(rows, [1], [matrix], threads=4)
    before = set(os.listdir("/proc/self/task"))
    for threads in (2, 4, 3, 4, 1, 4):
        assert torch.equal(cpu.linear_each(rows, [1], [matrix], threads=threads), alone)
        assert set(os.listdir("/proc/self/task")) == before
