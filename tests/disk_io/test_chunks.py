"""However an expert is cut into chunks, they are the expert, and cheap to read."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moe_offload.disk_io.chunks import Chunk, Run, Segment, Solid, cut, joined_runs
from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.system.host_memory import PAGE_BYTES

CONTENT = bytes(i * 37 % 251 for i in range(40_000))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("chunks") / "weights.bin"
    path.write_bytes(CONTENT)
    return File.now(path)


def sevens(target):
    target[:] = bytes([7]) * len(target)


@st.composite
def experts(draw):
    """Pieces that fill a record without gaps, from places anywhere in a file."""
    pieces, start = [], 0
    for _ in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 3000) | st.integers(1, 9000), min_size=1, max_size=3))
        segments = []
        for nbytes in lengths:
            segments.append(Segment(start, start + nbytes))
            start += nbytes
        if draw(st.integers(0, 4)) == 0:
            pieces += [Solid(segment, sevens) for segment in segments]
        else:
            offset = draw(st.integers(0, len(CONTENT) - sum(lengths)))
            pieces.append((offset, tuple(segments)))
    return pieces, start


sizes = st.none() | st.integers(100, 500) | st.integers(500, 60_000)


def made(expert, file):
    return [Run(file, *piece) if isinstance(piece, tuple) else piece for piece in expert]


def filled(pieces, nbytes, past_cache=False):
    record = bytearray(nbytes)
    for piece in pieces:
        piece.read_into([memoryview(record)[start:stop] for start, stop in piece.segments], past_cache=past_cache)
    return bytes(record)


@settings(deadline=None, max_examples=150)
@given(expert=experts(), chunk_bytes=sizes, order=st.randoms(use_true_random=False), past_cache=st.booleans())
def test_chunks_read_in_any_order_fill_the_record_as_its_pieces_do(file, expert, chunk_bytes, order, past_cache):
    pieces, nbytes = made(expert[0], file), expert[1]
    chunks = cut(pieces, chunk_bytes)
    order.shuffle(chunks)
    assert filled(chunks, nbytes, past_cache) == filled(pieces, nbytes)


@settings(deadline=None, max_examples=150)
@given(expert=experts(), chunk_bytes=sizes)
def test_every_byte_is_in_exactly_one_chunk(file, expert, chunk_bytes):
    pieces, nbytes = made(expert[0], file), expert[1]
    covered = sorted(segment for chunk in cut(pieces, chunk_bytes) for segment in chunk.segments)
    assert covered[0].start == 0
    assert covered[-1].stop == nbytes
    assert all(before.stop == after.start for before, after in pairwise(covered))
    assert all(segment.nbytes > 0 for segment in covered)


@settings(deadline=None, max_examples=150)
@given(expert=experts(), chunk_bytes=sizes.filter(bool))
def test_no_chunk_is_larger_than_was_asked_for_unless_it_is_one_solid_piece(file, expert, chunk_bytes):
    for chunk in cut(made(expert[0], file), chunk_bytes):
        assert chunk.nbytes <= chunk_bytes or [type(piece) for piece in chunk.pieces] == [Solid]


@given(offset=st.integers(0, 9000), nbytes=st.integers(1, 1 << 24), number=st.integers(1, 9))
def test_one_run_is_cut_into_so_many_chunks_where_pages_begin(file, offset, nbytes, number):
    chunks = cut([Run(file, offset, (Segment(0, nbytes),))], -(-nbytes // number))
    starts = [chunk.pieces[0].offset for chunk in chunks]
    if nbytes >= 16 * PAGE_BYTES * number:
        assert all(start % PAGE_BYTES == 0 for start in starts[1:])
        assert len(chunks) <= number + 1
        assert min(chunk.nbytes for chunk in chunks) > nbytes / (number + 1) / 2, "no crumbs"
    assert starts[0] == offset


def test_neighbours_in_a_file_are_read_as_one_and_still_go_to_their_places(file):
    runs = [
        Run(file, 300, (Segment(0, 100),)),
        Run(file, 100, (Segment(200, 300),)),
        Run(file, 200, (Segment(100, 200),)),
    ]
    (joined,) = joined_runs(runs)
    assert (joined.offset, joined.end) == (100, 400)
    assert filled([joined], 300) == CONTENT[300:400] + CONTENT[200:300] + CONTENT[100:200]


def test_what_is_apart_in_a_file_stays_apart(file):
    runs = [Run(file, 300, (Segment(0, 100),)), Run(file, 100, (Segment(100, 199),))]
    assert [run.offset for run in joined_runs(runs)] == [100, 300]


def test_an_expert_without_bytes_has_nothing_to_read():
    assert cut([], None) == cut([], 10) == [Chunk(())]
