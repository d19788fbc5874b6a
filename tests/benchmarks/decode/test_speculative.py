"""The benchmark of assisted generation counts what is drafted, accepted and loaded; its wider model is the same one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def benchmark(script):
    return script("decode.speculative")


@pytest.fixture(scope="module")
def found(script, tiny_moe, one_thread):
    prompt = torch.arange(11, 23).repeat(2).tolist()
    job = {"group_size": 32, "percent": 25, "samples": False, "new_tokens": 24, "rounds": 2}
    return script("decode.speculative_row").measure_speculative(folder=tiny_moe, prompts=[prompt], **job)


def test_every_way_is_run_each_round_and_drafts_save_forwards(found):
    runs = found["runs"]
    assert {len(of_way) for of_way in runs.values()} == {2}
    plain, itself = runs["plain"][0], runs["itself in 2 bits, 4"][0]
    assert plain["tokens"] == plain["forwards"] == plain["rows"] == 23
    assert itself["forwards"] < itself["tokens"] < itself["rows"]
    assert itself["misses"] <= itself["asked"] < plain["asked"]
    assert [one["misses"] for one in runs["plain"]] == [plain["misses"]] * 2


def test_a_draft_that_leaves_too_little_of_the_budget_is_left_out(script):
    ways = script("decode.speculative_row").ways_of(None, None, 1000, None)
    assert all(way.budget == 1000 for way in ways)


def test_the_table_says_what_was_accepted(benchmark, found):
    (table,) = benchmark.tables({"rows": {"tiny-moe, greedy, 25%": found}})
    lines = {line[0]: line for line in table.rows}
    assert lines["plain"][4:6] == ["", "1.00"]
    assert lines["plain"][-1] == "2 of 2"
    assert lines["itself in 2 bits, 4"][4].endswith("%")


def test_wider_experts_compute_the_same(script, tiny_moe, tmp_path):
    folder = script("harness.widened").widened(Path(tiny_moe), 4, tmp_path)
    plain, wide = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (tiny_moe, folder))
    tokens = torch.arange(11, 31)[None]
    with torch.inference_mode():
        torch.testing.assert_close(wide(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
    assert wide.config.moe_intermediate_size == 4 * plain.config.moe_intermediate_size
    assert script("harness.widened").widened(Path(tiny_moe), 4, tmp_path) == folder


def test_quick_measures_how_well_drafts_name_experts(script, texts, one_thread, tmp_path):
    script("prefetch.draft_recall").measure_draft_recall(quick=True, text=texts, results=tmp_path, threads=1)
    (path,) = tmp_path.glob("draft-recall-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert all(0 < share <= 1 for found in rows.values() for name, share in found.items() if name != "experts wanted")
