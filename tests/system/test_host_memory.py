"""Memory that disks write into begins at pages, and is never handed out twice."""

import mmap
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.system.host_memory import AREA_BYTES, PAGE_BYTES, PageMemory


def places(memory):
    return range(memory.data_ptr(), memory.data_ptr() + memory.nbytes)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE_BYTES)), max_size=30))
def test_what_is_handed_out_begins_at_a_page_and_overlaps_nothing(steps):
    memory, held = PageMemory(), []
    for gives_back, nbytes in steps:
        if gives_back and held:
            memory.give_back(held.pop(nbytes % len(held)))
        else:
            held.append(memory.take(nbytes))
            assert held[-1].shape == (nbytes,)
            assert held[-1].data_ptr() % PAGE_BYTES == 0
            held[-1].fill_(len(held))
    ends = sorted((places(one).start, places(one).stop) for one in held)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))


def test_a_piece_may_be_larger_than_an_area():
    memory = PageMemory()
    first, large = memory.take(10), memory.take(AREA_BYTES + 1)
    large[-1] = 7
    first.fill_(1)
    assert (int(large[-1]), large.nbytes) == (7, AREA_BYTES + 1)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system keeps the pages")
def test_pages_that_are_given_back_are_the_systems_and_come_back_empty():
    memory = PageMemory()
    piece = memory.take(3 * PAGE_BYTES)
    address = piece.data_ptr()
    piece.fill_(9)
    memory.give_back(piece)
    again = memory.take(3 * PAGE_BYTES)
    assert again.data_ptr() == address
    assert int(again.sum()) == 0


def test_memory_taken_while_generating_serves_training_later():
    with torch.inference_mode():
        memory = PageMemory()
        memory.give_back(memory.take(8))
        taken = memory.take(8), memory.take(8)
    assert not any(piece.is_inference() for piece in taken)


def test_memory_outlives_what_it_was_taken_from():
    piece = PageMemory().take(PAGE_BYTES)
    piece.fill_(3)
    assert piece.unique().tolist() == [3]
