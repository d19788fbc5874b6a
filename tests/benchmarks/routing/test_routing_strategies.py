"""Every strategy has its row, and the verdict is about what it says."""

import json
from pathlib import Path

import pytest

LICENCE = Path(__file__).parents[3] / "LICENSE"


@pytest.fixture(scope="module")
def strategies(script):
    return script("routing.routing_strategies")


@pytest.fixture(scope="module")
def result(strategies, one_thread, tmp_path_factory):
    """What `--quick` writes, with a licence for text, which will not change."""
    folder = tmp_path_factory.mktemp("strategies")
    licence = LICENCE.read_text()
    texts = {
        domain: {"held_out": [licence[start:4000]], "train": [licence[4000 + start :]]}
        for domain, start in (("prose", 0), ("python", 1000), ("c", 2000))
    }
    (folder / "texts.json").write_text(json.dumps(texts))
    strategies.measure_strategies(quick=True, text=folder / "texts.json", results=folder / "results", threads=1)
    (path,) = (folder / "results").glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 0
    assert path.with_suffix(".png").name in path.with_suffix(".md").read_text()
    return json.loads(path.read_text())


def test_every_strategy_has_a_row_and_every_name_a_strategy(strategies, result):
    assert set(result["rows"]) == set(strategies.STRATEGIES)
    assert result["rows"][strategies.OWN]["rise"] == 0
    elsewhere = {"cache_aware", "replay", "steer"}  # what they do depends on a cache, a recording, chosen experts
    names = {name for name, _ in strategies.STRATEGIES.values()} | elsewhere
    assert len(names) == len(strategies.routing.strategies.__all__), "one row or more for each class of strategies"


def test_chance_is_worse_than_the_router_on_any_text(strategies, result):
    assert result["rows"][strategies.CHANCE]["rise"] > 0.3
    promise, is_kept = strategies.verdict(result)
    assert is_kept
    assert "random routing hurts" in promise


def test_a_router_that_does_no_better_than_chance_breaks_the_promise(strategies, result):
    rows = {name: row | {"rise": -0.1} for name, row in result["rows"].items()}
    assert strategies.verdict(result | {"rows": rows})[1] is False
