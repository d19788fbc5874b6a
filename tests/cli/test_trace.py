"""`moe-offload trace` records what a generation asks for, and nothing it was not asked to."""

import os
import signal

import pytest

from transformers_moe_offload.tracing import Trace, TraceRecorder

from .conftest import the_error

FEW = ("--max-new-tokens", "4", "--temperature", "0")


def test_a_trace_holds_every_visit_of_every_layer(run, tiny_moe, tmp_path):
    path = tmp_path / "trace.npz"
    result = run("trace", tiny_moe, "-o", path, "--prompt", "import os", "--prompt", "int main(", *FEW)
    assert result.exit_code == 0, result.output
    trace = Trace.load(path)
    assert result.stdout == f"{path}: {trace}\n"
    assert trace.num_experts == (16,) * 8
    assert trace.experts_per_token == (4,) * 8
    assert trace.layer_names[0] == "model.layers.0.mlp.experts"
    prompt, other = trace.step_tokens[0], trace.step_tokens[4]
    assert min(prompt, other) > 1
    assert trace.step_tokens == [prompt, 1, 1, 1, other, 1, 1, 1]
    assert [visit.layer for visit in trace.visits] == [*range(8)] * 8
    decoding = [visit for visit in trace.visits if visit.step not in (0, 4)]
    assert {len(visit.wanted) for visit in decoding} == {4}


def test_prompts_are_the_lines_of_a_file(run, tiny_moe, tmp_path):
    (tmp_path / "prompts.txt").write_text("import os\n\nint main(\n")
    options = ("--max-new-tokens", "4", "--temperature", "0", "--cache-budget", "20%", "--policy", "lfu")
    from_file = run("trace", tiny_moe, "-o", tmp_path / "a.npz", "--prompts", tmp_path / "prompts.txt", *options)
    prompts = ("--prompt", "import os", "--prompt", "int main(")
    one_by_one = run("trace", tiny_moe, "-o", tmp_path / "b.npz", *prompts, *FEW)
    assert from_file.exit_code == one_by_one.exit_code == 0
    assert Trace.load(tmp_path / "a.npz").visits == Trace.load(tmp_path / "b.npz").visits


def test_ctrl_c_ends_the_recording_after_the_token_it_is_at_and_keeps_it(run, tiny_moe, tmp_path, monkeypatch):
    record = TraceRecorder.record

    def record_and_interrupt(recorder, layer, wanted):
        record(recorder, layer, wanted)
        if len(recorder.trace.visits) == 20:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TraceRecorder, "record", record_and_interrupt)
    path = tmp_path / "trace.npz"
    result = run("trace", tiny_moe, "-o", path, "--prompt", "import os", "--prompt", "int main(")
    assert result.exit_code == 130
    assert len(Trace.load(path).visits) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give prompts either with --prompt"),
        (("--prompt", "a", "--prompts", "b"), "give prompts either with --prompt"),
        (("--prompt", " "), "all prompts are blank"),
        (("--prompts", "missing.txt"), "cannot read --prompts missing.txt"),
        (("--prompt", "a", "--policy", "belady"), "needs future requests"),
        (("--prompt", "a", "--cache-budget", "much"), "is not a budget"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_one_line_and_writes_nothing(run, tiny_moe, tmp_path, arguments, message):
    result = run("trace", tiny_moe, "-o", tmp_path / "trace.npz", *arguments, *FEW)
    assert message in the_error(result)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_noticed_before_anything_is_generated(run, tiny_moe, tmp_path):
    result = run("trace", tiny_moe, "-o", tmp_path / "nowhere" / "trace.npz", "--prompt", "a", *FEW)
    assert "which is not a folder" in the_error(result)
    assert "Loading weights" not in result.stderr


def test_a_folder_that_a_recording_cannot_go_to_is_noticed_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ("-o", tmp_path / "trace.npz", "--prompt", "a", "--routing", tmp_path)
    assert "has other files, 'notes.txt' among them" in the_error(run("trace", tmp_path / "nothing", *arguments))


def test_a_model_that_cannot_be_loaded_is_one_line(run, tmp_path):
    result = run("trace", tmp_path / "nothing", "-o", tmp_path / "trace.npz", "--prompt", "a", *FEW)
    assert "cannot load" in the_error(result)


def test_a_folder_in_place_of_the_trace_is_noticed_before_anything_is_generated(run, tiny_moe, tmp_path):
    result = run("trace", tiny_moe, "-o", tmp_path, "--prompt", "a", *FEW)
    assert f"cannot write --output {tmp_path}: it is a folder" in the_error(result)
    assert "Loading weights" not in result.stderr


def test_a_folder_that_cannot_be_written_to_is_noticed_before_anything_is_generated(run, tiny_moe, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("nothing is closed to root")
    result = run("trace", tiny_moe, "-o", tmp_path / "trace.npz", "--prompt", "a", *FEW)
    assert f"{tmp_path} cannot be written to" in the_error(result)
    assert "Loading weights" not in result.stderr
