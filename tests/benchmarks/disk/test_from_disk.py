"""What a forward needs of the disk is held against what the disk gave around it."""

import pytest


@pytest.fixture
def from_disk(script):
    return script("disk.from_disk")


def work(elapsed_s, needed_bytes=600, bytes_per_s=1000.0, resident_s=0.1):
    run = {"elapsed_s": elapsed_s, "forward_s": [elapsed_s], "needed_bytes": needed_bytes, "bytes_per_s": bytes_per_s}
    return {"runs": [run | {"hits": 1, "asked": 2}], "resident_s": resident_s}


def test_the_larger_of_disk_and_resident_compute_is_the_limit(from_disk):
    assert from_disk.reached(work(1.2)) == pytest.approx(0.5)
    assert from_disk.reached(work(1.2, resident_s=0.9)) == pytest.approx(0.75)


def test_the_disk_counts_as_it_was_around_each_run(from_disk):
    slower = work(1.2)
    slower["runs"] += work(2.4, bytes_per_s=500.0)["runs"]
    assert from_disk.reached(slower) == pytest.approx(0.5)


def test_the_better_manner_of_reading_is_held_against_the_promise(from_disk):
    rows = {
        "tiny, 25%, through the page cache": {"works": {"decode": work(1.2)}},
        "tiny, 25%, past the page cache": {"works": {"decode": work(0.75)}},
    }
    assert from_disk.verdicts({"rows": rows}) == [("tiny, 25%, decode: at least 60% of the limit: 80%", True)]
    assert len(from_disk.table({"rows": rows}).rows) == 2


def test_every_miss_of_a_row_is_read_from_the_disk(script, tiny_moe, one_thread):
    job = {"budget": "25%", "past_cache": False, "ahead": False, "rounds": 1, "steps": 2, "prefill_tokens": 8}
    found = script("disk.disk_row").measure_from_disk(folder=tiny_moe, **job)
    assert list(found["works"]) == ["decode", "prefill 8"]
    for done in found["works"].values():
        (run,) = done["runs"]
        assert run["needed_bytes"] == run["disk_bytes"] > 0
        assert run["bytes_per_s"] > 0
        assert done["resident_s"] > 0
