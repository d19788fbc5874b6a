"""What is promised under a cap is judged by figures of one run."""

import pytest


def run(elapsed_s, **counts):
    return {"tokens": 2, "elapsed_s": elapsed_s, **counts}


@pytest.fixture
def result():
    """A token of ours takes 1 s, of which the disk needs 0.5; accelerate's best takes 8."""
    ours = {"capped": [run(2.0, misses=10, read_bytes=1000)], "peak_bytes": 2**20}
    return {
        "cap_bytes": 2**20,
        "capped_by": "cgroup v2",
        "expert_bytes": 100,
        "bandwidth": {"cold_bytes_per_s": 1000.0},
        "resident": [run(0.4)],
        "rows": {
            "ours 25% fast copied": ours,
            "accelerate eager": {"capped": [run(20.0, read_bytes=1000)], "peak_bytes": None},
            "accelerate grouped_mm": {"capped": [run(16.0, read_bytes=1000)], "peak_bytes": None},
        },
    }


def test_ours_is_held_against_the_best_row_of_accelerate(script, result):
    capped = script("disk.capped")
    promise, is_kept = capped.verdict(result)
    assert is_kept
    assert "8.0 times" in promise
    assert "disk 500 ms, resident compute 200 ms" in promise
    result["rows"]["accelerate eager"]["capped"] = [run(11.0)]
    assert capped.verdict(result)[1] is False


def test_the_table_says_how_much_of_the_limit_was_reached(script, result):
    rows = {row[0]: row for row in script("disk.capped").table(result).rows}
    assert rows["ours 25% fast copied"][3:6] == ["8.0", "2.00", "50%"]
    assert rows["accelerate grouped_mm"][3:6] == ["1.0", "", ""]


def test_without_a_row_to_compare_with_nothing_is_claimed(script, result):
    del result["rows"]["ours 25% fast copied"]
    assert script("disk.capped").verdict(result)[1] is None
