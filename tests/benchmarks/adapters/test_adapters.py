"""Made mixtures are mixtures, and offloading them takes the memory of the cache."""

import pytest


@pytest.fixture(scope="module")
def mixture(script, tmp_path_factory):
    make = script("adapters.make_adapters")
    return make.made_mixture(make.SMALL, 12, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def rows(script, mixture, one_thread):
    measure = script("adapters.adapters").measure_row
    return {budget: measure(str(mixture), 2, 4, budget) for budget in (None, "100%", "25%")}


def test_a_row_measures_every_round_of_every_setting(rows):
    assert all([run["tokens"] for run in row["runs"]] == [4, 4] for row in rows.values())
    assert len({row["adapter_bytes"] for row in rows.values()}) == 1


def test_adapters_in_memory_and_offloaded_give_the_same_logits(rows):
    assert len({run["digest"] for row in rows.values() for run in row["runs"]}) == 1


def test_a_cache_that_holds_all_misses_nothing_and_a_small_one_does(rows):
    misses = {budget: sum(run["misses"] for run in rows[budget]["runs"]) for budget in ("100%", "25%")}
    assert misses["100%"] == 0
    assert misses["25%"] > 0
    assert rows["25%"]["cache_bytes"] < rows["100%"]["cache_bytes"] / 3


def test_the_table_and_the_verdict_name_what_was_measured(script, rows):
    adapters = script("adapters.adapters")
    names = dict(zip(("10, in memory", "30, in memory", "30, offloaded"), rows.values(), strict=True))
    table = adapters._table({"rows": names})
    assert [row[0] for row in table.rows] == list(names)
    assert table.rows[0][2] == ""
    assert table.rows[1][2] == "100%"
    ((verdict, _),) = adapters._verdicts({"rows": names}, 30)
    assert "30 adapters offloaded" in verdict
