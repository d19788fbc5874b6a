"""What a recording costs is measured with every way to load the model, and held against what is promised."""

import json

import pytest


@pytest.fixture(scope="module")
def recording(script):
    return script("routing.recording")


def test_every_row_is_measured_with_and_without_a_recording(recording, one_thread, tmp_path):
    recording.measure_recording(quick=True, rounds=1, results=tmp_path)
    (path,) = tmp_path.glob("recording-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert set(rows) == set(recording.ROWS)
    assert all(len(times) == 2 and min(times) > 0 for row in rows.values() for times in row.values())


def test_the_neighbours_ratio_decides_and_a_tenth_more_is_the_most(recording):
    rows = {
        "kept": {"cpu_off": [1.0, 2.0, 4.0], "cpu_on": [1.05, 2.1, 9.0]},
        "broken": {"cpu_off": [1.0, 1.0, 1.0], "cpu_on": [1.2, 1.2, 1.0]},
    }
    assert [kept for _, kept in recording.verdicts({"rows": rows})] == [True, False]
