"""A whole measurement is complete, consistent, and leaves the model as it was."""

import json
from dataclasses import replace

import pytest

from transformers_moe_offload.bench import session
from transformers_moe_offload.bench.report import facts, tables
from transformers_moe_offload.bench.workload import QUICK, Run, Workload

SHORT = replace(QUICK, prompt_tokens=4, decode_tokens=2, prefill_tokens=(16,), batch=2, beams=2, dispatch_passes=1)


@pytest.fixture(scope="module")
def result(model, passage):
    return session.measure(model, passage, SHORT)


def test_every_workload_is_measured_warm_and_cold(result):
    assert list(result["workloads"]) == ["decode", "prefill 16", "batch 2", "beam 2"]
    for entry in result["workloads"].values():
        assert len(entry["warm"]) == len(entry["cold"]) == SHORT.runs
        assert entry["resident_s"] > 0


def test_the_share_of_the_limit_is_that_of_the_two_speeds(result):
    for entry in result["workloads"].values():
        found = entry["cold_summary"]
        assert found["reached"] == pytest.approx(found["tokens_per_s"] / found["limit_tokens_per_s"])


def test_the_result_is_json_and_names_its_conditions(result):
    assert json.loads(json.dumps(result))["protocol"]["decode_tokens"] == SHORT.decode_tokens
    shown = facts(result)
    assert {"machine", "system", "software", "commit", "torch threads", "model", "experts", "cache", "lengths"} <= set(
        shown
    )
    assert "cache_budget=40%" in shown["cache"]


def test_there_is_a_table_for_each_thing_measured(result):
    titles = [table.title for table in tables(result)]
    assert [title.split(" (")[0].split(" at ")[0] for title in titles] == [
        "Bandwidth", "One sparse layer", "Page cache warm", "Page cache cold",
    ]  # fmt: skip


def test_the_budget_is_what_it_was(result, model):
    assert model.moe_offload.config.cache_budget == "40%"
    assert model.moe_offload.plan.num_slots == result["model"]["slots"] == 51


def test_without_room_for_all_experts_stalls_are_taken_off_and_it_is_said(model, passage, monkeypatch):
    monkeypatch.setattr(session, "available_bytes", lambda device: 0)
    monkeypatch.setattr(session, "_is_possible", lambda state, model, notes: state == "warm")
    result = session.measure(model, passage, SHORT)
    assert any("there is room for" in note for note in result["notes"])
    entry = result["workloads"]["decode"]
    run = entry["warm"][0]
    assert entry["resident_s"] == pytest.approx((run["elapsed_s"] - run["stall_ms"] / 1e3) / SHORT.decode_tokens)


def test_a_state_for_which_the_ram_is_short_is_left_out_and_it_is_said(model, monkeypatch):
    monkeypatch.setattr(session, "available_bytes", lambda device: 1)
    notes = []
    assert not session._is_possible("warm", model, notes)
    assert "do not fit into the 1 bytes of RAM" in notes[0]


RUN = Run(
    elapsed_s=1.0, forward_s=[0.5, 0.5], asked=10, hits=4, late_hits=0, misses=6, prefetch_used=0, prefetch_wasted=0,
    disk_bytes=900, device_bytes=0, stall_ms=100.0, needed_bytes=600,
)  # fmt: skip
WORK = Workload(name="decode", prompt_tokens=1, steps=2)


def test_the_limit_counts_needed_bytes_and_not_those_fetched_in_vain():
    found = session.summary([RUN], WORK, resident_s=0.1, speeds={"disk_bytes": 1000.0})
    assert found["limit_tokens_per_s"] == pytest.approx(1 / 0.3)
    assert found["reached"] == pytest.approx(0.6)
    assert found["hit_rate"] == 0.4
    assert found["limited_by"] == "disk"


def test_where_nothing_has_to_be_brought_in_the_limit_is_resident_compute():
    found = session.summary([RUN], WORK, resident_s=0.25, speeds={})
    assert found["limit_tokens_per_s"] == 4
    assert found["share_of_resident_speed"] == 0.5
    assert found["limited_by"] == "compute"


def test_a_layer_is_taken_apart_with_a_cache_for_all_experts_too(result):
    assert result["dispatch_resident"]["us_per_layer"]["whole"] > 0
    assert result["dispatch_resident"]["resident_share"] == 1
