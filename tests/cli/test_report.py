"""`moe-offload report` leaves plots in a folder."""

import re

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


@pytest.fixture
def routed(run, tiny_moe, tmp_path):
    """The folder of a recording of the routing."""
    folder = tmp_path / "routing"
    arguments = ("--prompt", "import os", "--max-new-tokens", "6", "--routing", folder)
    result = run("trace", tiny_moe, "-o", tmp_path / "trace.npz", *arguments)
    assert result.exit_code == 0, result.output
    assert "tokens in 6 forwards, 8 routers" in result.stdout
    return folder


def test_a_page_holds_everything_and_asks_for_nothing(run, routed, tmp_path):
    for trace, headings in (
        (routed, ["Routers", "Sureness", "Load", "Reuse", "Pairs"]),
        (tmp_path / "trace.npz", []),
    ):
        page = tmp_path / "report.html"
        result = run("report", trace, "-o", page, "--policy", "lru")
        assert result.exit_code == 0, result.output
        text = page.read_text()
        for heading in (*headings, "Hit rates"):
            assert f"<h2>{heading}</h2>" in text
        assert text.count("data:image/png;base64,") >= 2
        assert not re.search(r"(src|href)=.(?!data:)|url\(|<script", text)


def test_plots_of_the_routing_go_into_a_folder_as_well(run, routed, tmp_path):
    result = run("report", routed, "-o", tmp_path / "plots", "--policy", "lru")
    assert result.exit_code == 0, result.output
    plots = [tmp_path / "plots" / name for name in ("hit-rates.png", "sureness.png", "load.png", "reuse.png")]
    assert all(is_png(plot) for plot in plots)


def test_a_recording_is_replayed_as_the_trace_of_the_same_generation_is(run, routed, tmp_path):
    of_both = [run("replay", one).stdout.splitlines()[1:] for one in (routed, tmp_path / "trace.npz")]
    assert of_both[0] == of_both[1]
    assert any("belady" in line for line in of_both[0])


def test_a_page_that_cannot_be_written_is_refused_in_one_line(run, tmp_path):
    path = save_trace(tmp_path / "trace.npz")
    arguments = ("--policy", "lru", "--slots", "50%")
    assert "cannot write the page" in the_error(run("report", path, "-o", tmp_path / "no" / "page.html", *arguments))
