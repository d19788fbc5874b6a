"""What a series of rows begins with and ends with."""

import pytest
import typer


def test_a_series_goes_on_after_a_row_that_fails_and_keeps_the_reason(script, tmp_path):
    found = script("harness.series").measured_rows(
        "benchmarks.no_such:row", {"one": {}, "two": {}}, tmp_path, threads=1
    )
    assert found["rows"] == {}
    assert list(found["failed"]) == ["one", "two"]
    assert all("benchmarks.no_such" in reason for reason in found["failed"].values())
    assert {"date", "conditions"} <= set(found)


def test_a_job_with_variables_of_its_own_is_started_from_nothing_and_says_why_it_fails(script):
    job = script("harness.job")
    with pytest.raises(job.JobFailedError, match=r"(?s)exit code 1: .*benchmarks\.no_such"):
        job.run_job("benchmarks.no_such:row", {}, None, variables={"TRITON_INTERPRET": "1"})


def test_a_series_that_was_broken_off_goes_on_where_it_was(script, tmp_path, monkeypatch):
    series, done = script("harness.series"), []

    def answered(work, job, threads):
        done.append(job["number"])
        return job

    monkeypatch.setattr(series, "run_job", answered)
    jobs = {"one": {"number": 1}, "two": {"number": 2}}
    with pytest.raises(typer.Exit):
        series.measured_rows("benchmarks.a:row", jobs, tmp_path, 1, parts=tmp_path, most_s=-1)
    monkeypatch.setattr(series.time, "monotonic", iter([0.0, 1.0, 2.0, 3.0, 9.0]).__next__)
    with pytest.raises(typer.Exit):
        series.measured_rows("benchmarks.a:row", jobs, tmp_path, 1, parts=tmp_path, most_s=5)
    assert done == [1]
    monkeypatch.undo()
    monkeypatch.setattr(series, "run_job", answered)
    assert series.measured_rows("benchmarks.a:row", jobs, tmp_path, 1, parts=tmp_path)["rows"] == jobs
    assert done == [1, 2]
    assert list(tmp_path.iterdir()) == []


def test_the_compared_models_are_there_once_they_are_named(script, tmp_path):
    models = script("harness.series").compared_models(quick=True, made=tmp_path)
    assert list(models) == ["tiny-moe", "OLMoE-shaped"]
    assert all((folder / "config.json").exists() for folder in models.values())
