"""`moe-offload replay` prints what the replays counted."""

import json

import pytest

from transformers_moe_offload.policies import policy_names
from transformers_moe_offload.tracing import TraceRecorder, replay

from .conftest import the_error


@pytest.fixture
def trace(tmp_path):
    """A file: two layers of 8 experts, 60 visits that come back to some experts more than to others."""
    recorder = TraceRecorder(["a.experts", "b.experts"], [8, 8])
    for turn in range(60):
        recorder.record(turn % 2, sorted({turn * turn % 8, turn % 3, 7 - turn % 2}))
    recorder.trace.save(tmp_path / "trace.npz")
    return recorder.trace


@pytest.fixture
def file(trace, tmp_path):
    return tmp_path / "trace.npz"


def rows(result):
    """Policy -> the cells of its row."""
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells and cells[0] in [*policy_names(), "belady"]}


def test_the_table_has_every_policy_and_the_oracle_last(run, trace, file):
    shown = rows(run("replay", file))
    assert [*shown] == [*policy_names(), "belady"]
    for name, cells in shown.items():
        assert cells == [f"{replay(trace, name, num_slots).hit_rate:.1%}" for num_slots in (1, 4, 8)]


def test_policies_and_sizes_can_be_chosen(run, trace, file):
    result = run("replay", file, "--policy", "lfu", "--policy", "belady", "--policy", "lru", "--slots", "50%, 3")
    assert [*rows(result)] == ["lfu", "lru", "belady"]
    assert result.stdout.splitlines()[2].split() == ["3", "slots", "8", "slots"]
    assert result.stdout.splitlines()[3].split() == ["policy", "18.8%", "50.0%"]
    assert rows(result)["lru"] == [f"{replay(trace, 'lru', num_slots).hit_rate:.1%}" for num_slots in (3, 8)]


def test_all_counts_are_written_as_json(run, trace, file, tmp_path):
    assert run("replay", file, "--policy", "lru", "--slots", "25%", "--json", tmp_path / "r.json").exit_code == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["layers"] == ["a.experts", "b.experts"]
    assert (written["visits"], written["steps"]) == (60, 30)
    lru, belady = written["replays"]
    assert (lru["policy"], lru["slots"], belady["policy"]) == ("lru", 4, "belady")
    assert lru["hits"] == sum(lru["hits_per_layer"]) == replay(trace, "lru", 4).hits
    assert sum(lru["hits_per_layer"]) + sum(lru["misses_per_layer"]) == trace.num_asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slots", "much"), "--slots: 'much' is neither a number of slots"),
        (("--slots", "10%,"), "--slots: '' is neither a number of slots"),
        (("--slots", "5%"), "--slots: 5% comes to 0 slots, and the trace's model has 16 experts"),
        (("--slots", "17"), "--slots: 17 comes to 17 slots"),
        (
            ("--policy", "lur"),
            f"--policy 'lur' is not a known policy; choose one of {[*policy_names(), 'belady']}; did you mean 'lru'?",
        ),
        (("--json", "nowhere/r.json"), "cannot write --json nowhere/r.json"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(run, file, arguments, message):
    assert message in the_error(run("replay", file, *arguments))


def test_a_trace_without_a_visit_is_refused(run, tmp_path):
    TraceRecorder(["a.experts"], [8]).trace.save(tmp_path / "empty.npz")
    assert "holds no visit" in the_error(run("replay", tmp_path / "empty.npz"))


def test_a_file_that_is_no_trace_is_refused(run, tmp_path):
    (tmp_path / "trace.npz").write_text("none")
    assert "cannot read the trace" in the_error(run("replay", tmp_path / "trace.npz"))
