"""A layer's overhead is measured at two sizes of the cache, and held against what is promised."""

import pytest


@pytest.fixture
def overhead(script):
    return script("decode.overhead")


def result(smaller, larger):
    parts = dict.fromkeys(("arithmetic", "grouping", "visit", "combine", "rest"), 1.0)
    sizes = {"50": smaller, "100": larger}
    found = {
        percent: {"us_per_layer": parts | {"whole": whole, "overhead": beyond}, "resident_share": 1.0}
        for percent, (whole, beyond) in sizes.items()
    }
    return {"rows": {"tiny, mapped": {"dispatch": found}}}


def test_the_worse_size_counts_and_a_larger_cache_may_not_be_slower(overhead):
    assert [kept for _, kept in overhead.verdicts(result((500.0, 100.0), (500.0, 150.0)))] == [True, True]
    assert [kept for _, kept in overhead.verdicts(result((500.0, 151.0), (500.0, 100.0)))] == [False, True]
    assert [kept for _, kept in overhead.verdicts(result((500.0, 100.0), (530.0, 100.0)))] == [True, False]
    assert len(overhead.table(result((500.0, 100.0), (500.0, 100.0))).rows) == 2


def test_a_steps_experts_are_resident_at_either_size(script, tiny_moe, one_thread):
    job = {"is_copied": True, "percents": [50, 100], "passes": 1}
    found = script("decode.overhead").measure_layers(folder=tiny_moe, **job)
    assert [one["resident_share"] for one in found["dispatch"].values()] == [1.0, 1.0]
    assert all(one["us_per_layer"]["arithmetic"] > 0 for one in found["dispatch"].values())
