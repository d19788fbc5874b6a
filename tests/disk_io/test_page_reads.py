"""Whole pages of files hold an expert's bytes where its place says they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stores import unopened
from transformers_moe_offload.disk_io.file import FileRange
from transformers_moe_offload.disk_io.page_reads import most_spare_bytes, parts, placed
from transformers_moe_offload.system.host_memory import PAGE_BYTES

FILES = [unopened(f"file {number}", 20 * PAGE_BYTES) for number in range(2)]


@st.composite
def experts(draw):
    """Fields that lie in two files, one behind the other or with gaps between them, in any order."""
    ranges = []
    for file in FILES:
        end = draw(st.integers(0, 2 * PAGE_BYTES))
        for _ in range(draw(st.integers(0, 3))):
            start = end + draw(st.sampled_from([0, 0, 8, PAGE_BYTES, 3 * PAGE_BYTES + 8]))
            end = start + draw(st.sampled_from([1, 100, PAGE_BYTES, 2 * PAGE_BYTES + 24]))
            ranges.append(FileRange(file, start, end))
    return draw(st.permutations(ranges)) if ranges else [FileRange(FILES[0], 0, 1)]


def contents(read, nbytes=None):
    """What a read brings: for each byte its file and place."""
    return [(read.file, read.offset + at) for at in range(read.nbytes if nbytes is None else nbytes)]


@given(experts())
def test_every_field_is_where_its_place_says(ranges):
    place = placed(ranges)
    memory = [None] * place.nbytes
    for read in place.reads:
        memory[read.start : read.start + read.needed] = contents(read, read.needed)
    for field, begins in zip(ranges, place.offsets, strict=True):
        nbytes = field.stop - field.start
        assert memory[begins : begins + nbytes] == [(field.file, at) for at in range(field.start, field.stop)]


@given(experts())
def test_reads_are_whole_pages_and_no_more_than_was_planned_for(ranges):
    place = placed(ranges)
    for read in place.reads:
        assert read.offset % PAGE_BYTES == read.nbytes % PAGE_BYTES == read.start % PAGE_BYTES == 0
        assert read.nbytes - PAGE_BYTES < read.needed <= read.nbytes
    wanted = sum(field.stop - field.start for field in ranges)
    assert wanted <= place.nbytes <= wanted + most_spare_bytes(ranges)


@given(experts(), st.integers(1, 4 * PAGE_BYTES))
def test_parts_bring_the_same_pages(ranges, most):
    for read in placed(ranges).reads:
        found = parts(read, most)
        assert [byte for part in found for byte in contents(part)] == contents(read)
        assert sum(part.needed for part in found) == read.needed
        assert all(part.nbytes <= max(most, PAGE_BYTES) for part in found)


def test_neighbours_in_a_file_are_read_at_once():
    place = placed([FileRange(FILES[0], 5000, 9000), FileRange(FILES[0], 1000, 5000)])
    assert [(read.offset, read.nbytes, read.needed) for read in place.reads] == [(0, 3 * PAGE_BYTES, 9000)]
    assert place.offsets == (5000, 1000)


@pytest.mark.parametrize(("nbytes", "spare"), [(PAGE_BYTES, PAGE_BYTES), (PAGE_BYTES + 1, 2 * PAGE_BYTES)])
def test_an_expert_of_whole_pages_touches_at_most_one_more(nbytes, spare):
    assert most_spare_bytes([FileRange(FILES[0], 64, 64 + nbytes)]) == spare
