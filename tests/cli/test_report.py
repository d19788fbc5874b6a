"""`moe-offload report` leaves plots in a folder."""

import pytest

from transformers_moe_offload.tracing import TraceRecorder

from .conftest import the_error


def save_trace(path, **options):
    recorder = TraceRecorder(["a.experts", "b.experts"], [8, 8], **options)
    for turn in range(60):
        recorder.record(turn % 2, sorted({turn * turn % 8, turn % 3}))
    recorder.trace.save(path)
    return path


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_trace_with_times_gives_three_plots(run, tmp_path):
    path = save_trace(tmp_path / "trace.npz", stall_ms=lambda: 0.0)
    folder = tmp_path / "made" / "for it"
    result = run("report", path, "-o", folder)
    assert result.exit_code == 0, result.output
    plots = [folder / name for name in ("hit-rates.png", "expert-use.png", "stalls.png")]
    assert result.stdout.splitlines() == [str(plot) for plot in plots]
    assert all(is_png(plot) for plot in plots)


def test_the_plot_of_stalls_is_left_out_with_a_word_where_there_are_no_times(run, tmp_path):
    result = run("report", save_trace(tmp_path / "trace.npz"), "-o", tmp_path, "--slots", "50%", "--policy", "lru")
    assert result.stdout.splitlines()[-1] == "stalls.png is left out: the trace has no times"
    assert not (tmp_path / "stalls.png").exists()


@pytest.mark.parametrize("arguments", [("--slots", "0"), ("--policy", "lur", "--slots", "2")])
def test_what_makes_no_sense_is_refused_in_one_line(run, tmp_path, arguments):
    path = save_trace(tmp_path / "trace.npz")
    assert the_error(run("report", path, "-o", tmp_path / "plots", *arguments)).startswith("error: ")


def test_a_folder_that_cannot_be_made_is_refused(run, tmp_path):
    path = save_trace(tmp_path / "trace.npz")
    assert "cannot make the folder" in the_error(run("report", path, "-o", path))
