"""A trace comes back from its file as it was, and a file that is no sound trace is refused with the reason."""

import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.tracing import RecordedVisit, Trace, TraceError, TraceRecorder


def small_trace(**changes):
    recorder = TraceRecorder(["layers.0.experts", "layers.1.experts"], [4, 8])
    recorder.trace.experts_per_token = (2, 3)
    for layer, wanted in [(0, [3, 1]), (1, [0, 7, 2]), (0, [1, 2]), (1, [5])]:
        recorder.record(layer, wanted)
    for name, value in changes.items():
        setattr(recorder.trace, name, value)
    return recorder.trace


def arrays_of(path):
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def saved_with(path, **changes):
    """A trace's file with some arrays replaced, or left out where they are None."""
    small_trace(stall_ms=[0.0, 1.5, 0.25, 0.0]).save(path)
    arrays = arrays_of(path) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_trace_comes_back_as_it_was_saved(tmp_path_factory, data):
    num_experts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    layers = st.integers(0, len(num_experts) - 1)
    recorder = TraceRecorder(
        [f"Schichten.{i}.größte" for i in range(len(num_experts))],
        num_experts,
        stall_ms=data.draw(st.none() | st.just(lambda: 0.5)),
    )
    recorder.trace.experts_per_token = data.draw(st.none() | st.just((1,) * len(num_experts)))
    for layer in data.draw(st.lists(layers, max_size=12)):
        recorder.record(layer, data.draw(st.permutations(range(num_experts[layer])))[: data.draw(st.integers(0, 5))])
    recorder.trace.step_tokens = [data.draw(st.integers(0, 9)) for _ in recorder.trace.step_tokens]
    path = tmp_path_factory.mktemp("trace") / "a.npz"
    recorder.trace.save(path)
    assert Trace.load(path) == recorder.trace


def test_a_trace_says_how_much_it_holds():
    assert str(small_trace()) == ("2 steps, 4 visits of 2 sparse layers with 12 experts; 8 expert requests")
    assert repr(small_trace()) == f"Trace({small_trace()})"


def test_saving_replaces_an_older_trace_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "trace.npz"
    path.write_bytes(b"older")
    small_trace().save(path)
    assert Trace.load(path) == small_trace()
    assert os.listdir(tmp_path) == ["trace.npz"]


def test_a_name_without_a_suffix_is_kept(tmp_path):
    small_trace().save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace") == small_trace()


def test_a_trace_that_cannot_be_written_whole_leaves_the_older_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "trace.npz"
    small_trace().save(path)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(TraceError, match=r"cannot write the trace .*trace\.npz.*No space left"):
        small_trace().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["trace.npz"]


def test_a_trace_cannot_be_saved_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(TraceError, match=r"cannot write the trace .*nowhere"):
        small_trace().save(tmp_path / "nowhere" / "trace.npz")


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "trace.npz"
    small_trace().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(TraceError, match=r"cannot read the trace .*trace\.npz"):
            Trace.load(path)


def test_a_file_with_a_flipped_bit_is_refused_or_still_says_the_same(tmp_path):
    """Bits of names and times in an archive's headers mean nothing."""
    path = tmp_path / "trace.npz"
    small_trace().save(path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert Trace.load(path) == small_trace()
        except MoeOffloadError:
            refused += 1
    assert refused > len(whole) / 41 / 4


def test_a_file_that_is_not_there_and_a_file_of_something_else_are_refused(tmp_path):
    with pytest.raises(TraceError, match=r"cannot read the trace .*missing\.npz.*No such file"):
        Trace.load(tmp_path / "missing.npz")
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(TraceError, match="one array and not an archive"):
        Trace.load(tmp_path / "one.npy")
    np.savez(tmp_path / "other.npz", weights=np.arange(3))
    with pytest.raises(TraceError, match=r"it has no format, .*wanted; record one with `moe-offload trace`"):
        Trace.load(tmp_path / "other.npz")


def test_nothing_in_a_trace_is_ever_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    path = saved_with(tmp_path / "trace.npz", wanted=np.array([Bomb()], dtype=object))
    with pytest.raises(TraceError, match="its wanted is object of shape"):
        Trace.load(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": np.array([2])}, "its format is [2], and this version reads [1]"),
        ({"starts": None}, "it has no starts"),
        ({"scores": np.arange(3)}, "it has 'scores', which is not part of a trace"),
        ({"layer": np.array([0.0, 1.0, 0.0, 1.0])}, "its layer is float64 of shape (4,), not one row of"),
        ({"wanted": np.arange(8).reshape(2, 4)}, "its wanted is int64 of shape (2, 4)"),
        ({"num_experts": np.array([4])}, "it has 2 layers and 4 visits, but 1 entries of num_experts"),
        ({"step": np.array([0, 0, 1])}, "but 3 entries of step"),
        ({"starts": np.array([0, 2, 5, 7])}, "but 4 entries of starts"),
        ({"stall_ms": np.array([1.0])}, "but 1 entries of stall_ms"),
        ({"starts": np.array([0, 2, 5, 7, 9])}, "its starts do not divide the 8 experts"),
        ({"starts": np.array([0, 5, 2, 7, 8])}, "its starts do not divide the 8 experts"),
        ({"layer": np.array([0, 2, 0, 1])}, "a visit is of layer 2, and there are 2 layers"),
        ({"layer": np.array([0, -1, 0, 1])}, "a visit is of layer -1"),
        ({"wanted": np.array([3, 3, 0, 7, 2, 1, 2, 5])}, "a visit of layer 0 wants an expert twice: (3, 3)"),
        ({"wanted": np.array([3, 1, 0, 8, 2, 1, 2, 5])}, "wants experts 0 to 8, and the layer has 8"),
        ({"wanted": np.array([3, 1, 0, -1, 2, 1, 2, 5])}, "wants experts -1 to 2, and the layer has 8"),
        ({"step": np.array([0, 1, 0, 1])}, "step 0 comes after step 1"),
        ({"step": np.array([0, 0, 1, 2])}, "a visit is of step 2, and there are 2 steps"),
        ({"step": np.array([-1, 0, 1, 1])}, "step -1 comes after step 0"),
        ({"num_experts": np.array([4, 0])}, "layer 1 has 0 experts"),
        ({"stall_ms": np.array([0.0, np.nan, 0, 0])}, "its stall_ms has negative or infinite entries"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_with_what_disagrees(tmp_path, changes, message):
    path = saved_with(tmp_path / "trace.npz", **changes)
    with pytest.raises(TraceError, match=re.escape(message)):
        Trace.load(path)


def test_a_trace_loaded_and_one_recorded_are_of_one_kind(tmp_path):
    small_trace().save(tmp_path / "trace.npz")
    visit = Trace.load(tmp_path / "trace.npz").visits[1]
    assert visit == RecordedVisit(layer=1, wanted=(0, 7, 2), step=0)
    assert type(visit.layer) is int


def test_the_hottest_experts_are_those_most_chosen_in_all_layers_together():
    trace = Trace(("a", "b"), (4, 6), step_tokens=[1, 1])
    trace.visits = [RecordedVisit(0, (3, 1), 0), RecordedVisit(1, (5,), 0), RecordedVisit(0, (3,), 1)]
    assert trace.hottest("10%") == {"0": [3]}
    assert trace.hottest(0.2) == {"0": [1, 3]}
    assert trace.hottest("100%") == {"0": [1, 3], "1": [5]}, "what no token chose is not hot"


def prompt_and_tokens():
    """A prompt of five tokens that wants all experts but the last, then three tokens."""
    trace = Trace(("a",), (4,), step_tokens=[5, 1, 1, 1])
    trace.visits = [
        RecordedVisit(0, (0, 1, 2), 0),
        *(RecordedVisit(0, wanted, step) for step, wanted in ((1, (3, 2)), (2, (3, 1)), (3, (3, 2)))),
    ]
    return trace


def test_tokens_are_counted_in_steps_of_one_token():
    trace = prompt_and_tokens()
    assert trace.counts() == {"a": [1, 2, 3, 3]}, "once a visit"
    assert trace.token_counts() == {"a": [0, 1, 2, 3]}
    assert trace.hottest("50%") == {"0": [2, 3]}


@pytest.mark.parametrize(
    ("step_tokens", "message"),
    [
        ([5, 2, 7, 2], "its steps have 2 to 7 tokens, and"),
        ([3, 3, 3, 3], "its steps have 3 tokens, and"),
        ([0, 2, 1_500, 0], "its steps have 2 to 1,500 tokens, or an unknown number, and"),
        ([0] * 4, "its steps have an unknown number of tokens, and"),
        ([], "it has no steps, and"),
    ],
)
@pytest.mark.parametrize("count", [Trace.token_counts, lambda trace: trace.hottest(0.5)])
def test_without_a_step_of_one_token_a_trace_counts_no_tokens_and_says_what_does(count, step_tokens, message):
    trace = prompt_and_tokens()
    trace.step_tokens = step_tokens
    with pytest.raises(TraceError, match=re.escape(message)) as caught:
        count(trace)
    assert "`routing.record_routing`" in str(caught.value)
    assert "`moe-offload trace --routing`" in str(caught.value)


def test_where_no_token_chose_an_expert_none_is_hot_and_that_is_an_error():
    with pytest.raises(TraceError, match="no token chose an expert"):
        Trace(("a",), (4,), step_tokens=[1]).hottest("50%")


@pytest.mark.parametrize("share", [0, 1.5, "0%", "120%", "ten", "10", True, None])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(TraceError, match="is not a share of all experts"):
        Trace(("a",), (100,), step_tokens=[1]).hottest(share)


def test_a_share_of_no_expert_is_refused():
    with pytest.raises(TraceError, match="of 4 experts is less than one of them"):
        Trace(("a",), (4,), step_tokens=[1]).hottest("1%")


def test_what_is_no_archive_is_said_to_be_none_and_nobody_is_told_to_unpickle_it(tmp_path):
    path = tmp_path / "trace.json"
    for content in (b'{"visits": []}', b"", b"nothing"):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=r"cannot read the trace .*it is not an \.npz archive") as refused:
            Trace.load(path)
        assert "pickle" not in str(refused.value)


def test_an_archive_that_is_cut_short_says_so(tmp_path):
    path = tmp_path / "trace.npz"
    small_trace().save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TraceError, match="it is damaged, or was cut short"):
        Trace.load(path)
