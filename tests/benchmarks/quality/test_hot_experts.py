"""Hottest and coldest are told apart, and a mix costs the bits that its share says."""

import json

import pytest

from transformers_moe_offload.tracing import RecordedVisit, Trace


@pytest.fixture(scope="module")
def result(script, one_thread, texts, tmp_path_factory):
    """What `--quick` writes."""
    folder = tmp_path_factory.mktemp("hot-experts")
    script("quality.hot_experts").measure_hot_experts(quick=True, text=texts, results=folder)
    (path,) = folder.glob("hot-experts-*.json")
    return json.loads(path.read_text()) | {"page": path.with_suffix(".md").read_text()}


def test_a_mix_is_measured_for_the_hottest_and_the_coldest_beside_what_takes_as_many_bits(result):
    rows = {row["experts"]: row for row in result["rows"]}
    hottest, coldest = rows["2x32, the hottest 25.0% 4x32"], rows["2x32, the coldest 25.0% 4x32"]
    assert hottest["bits_per_expert_weight"] == pytest.approx(0.75 * (2 + 16.5 / 32) + 0.25 * (4 + 16.5 / 32), abs=0.01)
    assert hottest["bytes"] == coldest["bytes"]
    assert hottest["perplexity"]["all"] != coldest["perplexity"]["all"]
    assert rows["2x32"]["bytes"] < hottest["bytes"] < rows["3x32"]["bytes"]
    assert hottest["over_plain"]["ratio"] < rows["2x32"]["over_plain"]["ratio"]


def test_the_page_has_every_row_and_how_uneven_the_use_was(result):
    assert all(row["experts"] in result["page"] for row in result["rows"])
    assert all(name in result["page"] and part in result["page"] for name, part in result["uses"].items())


def test_the_coldest_are_those_that_are_asked_for_least(script):
    trace = Trace(("one", "other"), (4, 2), step_tokens=[1, 1, 1])
    trace.visits = [RecordedVisit(0, (1, 2), 0), RecordedVisit(1, (0, 1), 0), RecordedVisit(0, (2,), 1)]
    hot_experts = script("quality.hot_experts")
    assert trace.hottest(1 / 3) == {"0": [1, 2]}
    assert hot_experts.coldest(trace, 1 / 3) == {"0": [0, 3]}
    assert hot_experts.uses(trace) == pytest.approx({"hottest 10%": 2 / 5, "hottest 25%": 3 / 5, "hottest 50%": 4 / 5})
