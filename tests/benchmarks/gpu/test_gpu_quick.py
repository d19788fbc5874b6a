"""The GPU benchmark runs through everything that needs no GPU, where Triton's kernels are interpreted.

Jobs run in the process of the tests, which `test_interpreted.py` has started, instead of one of their own: the import
would take longer than the measurement.
"""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from interpreted import IS_INTERPRETED

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_INTERPRETED, reason="for Triton's interpreter")]


@pytest.fixture(scope="module")
def outcome(script, tmp_path_factory):
    """A quick run: its result and its report."""
    folder = tmp_path_factory.mktemp("benchmark")
    app = typer.Typer()
    app.command()(script("gpu.gpu").measure_gpu)

    def here(work, job, threads, *, variables):
        assert variables == {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        script("harness.job").do_job(work, json.dumps(job), folder / "answer")
        return json.loads((folder / "answer").read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script("harness.series"), "run_job", here)
        done = CliRunner().invoke(app, ["--quick", "--made", str(folder / "made"), "--results", str(folder)])
    assert done.exit_code == 0, done.output
    (result,), (page,) = folder.glob("gpu-*.json"), folder.glob("gpu-*.md")
    return result.read_text(), page.read_text()


def test_a_quick_run_measures_one_row_of_every_kind(script, outcome):
    result = json.loads(outcome[0])
    (setting,) = result["settings"].values()
    assert list(setting["rows"]) == list(script("gpu.rows").QUICK)
    for name, row in setting["rows"].items():
        assert "left_out" not in row, f"{name}: {row}"
        assert len(row["decode"][0]["forward_s"]) == 2
        assert row["prefill"]["24"][0]["forward_s"][0] > 0


def test_rows_decode_in_the_way_that_they_say(script, outcome):
    rows = next(iter(json.loads(outcome[0])["settings"].values()))["rows"]
    names = script("gpu.rows")
    for name in (names.RESIDENT, names.EAGER, names.GRAPHED):
        assert rows[name]["decoding"]["devices"] == 1, name
    for name in (names.GRAPHED, names.COMPILED):
        assert rows[name]["decoding"]["steps_replayed"] > 0, name
    assert rows[names.HOST]["decoding"] == {"devices": 0, "steps_captured": 0, "steps_replayed": 0}
    assert rows[names.EAGER]["decode"][0]["hits"] < rows[names.EAGER]["decode"][0]["asked"]


def test_logits_are_equal_whatever_is_resident_and_whether_steps_are_replayed(outcome):
    rows = next(iter(json.loads(outcome[0])["settings"].values()))["rows"]
    digests = [row["digest"] for row in rows.values() if row.get("digest")]
    assert len(digests) == 3  # what torch compiles rounds otherwise
    assert len(set(digests)) == 1


def test_the_report_names_its_conditions_and_no_folder_of_this_machine(outcome):
    for text in outcome:
        assert "/tmp" not in text
        assert str(Path.home()) not in text
    for word in ("machine", "torch", "commit", "routing", "lengths", "bandwidths", "| graphed |", "not measured"):
        assert word in outcome[1]
