"""The benchmark of predictions tunes each model, and its verdicts are about the settings that were run."""

import json

import pytest


@pytest.fixture(scope="module")
def benchmark(script):
    return script("decode.tuned")


def test_quick_tunes_each_model_and_writes_both_verdicts(benchmark, one_thread, tmp_path):
    benchmark.measure_tuned(quick=True, threads=1, made=tmp_path / "made", results=tmp_path / "results")
    (path,) = (tmp_path / "results").glob("tuned-*.json")
    result = json.loads(path.read_text())
    assert list(result["rows"]) == ["tiny-moe, 4MiB", "tiny-moe in 4 bits, 1MiB", "made, 100kB"]
    assert all(row["checked"] for row in result["rows"].values())
    written = path.with_suffix(".md").read_text()
    assert "within 15% for the recommended settings" in written
    assert "within 25% for all that were run" in written


def test_the_worst_row_decides(benchmark):
    def row(predicted, *errors):
        checked = [{"error": error} for error in errors]
        return {"predicted_tokens_per_s": predicted, "measured_tokens_per_s": 100, "checked": checked}

    def kept(*rows):
        return [is_kept for _, is_kept in benchmark.verdicts({"rows": dict(enumerate(rows))})]

    assert kept(row(110, 0.1, -0.2), row(90, -0.1)) == [True, True]
    assert kept(row(110, 0.1), row(80, -0.2)) == [False, True]
    assert kept(row(110, 0.1, 0.3)) == [True, False]
