"""Each row of the ablation does what it says, and none changes what is computed."""

from functools import cache

import pytest
from transformers import AutoModelForCausalLM

from transformers_moe_offload.bench.layers import experts_of, sparse_layers
from transformers_moe_offload.expert import ExpertId

LAYERS, EXPERTS, TOP_K, STEPS = 8, 16, 4, 3


@pytest.fixture(scope="module")
def measured(script, tiny_moe, one_thread):
    """Measure one row, once."""
    lengths = {"prompt_tokens": 8, "steps": STEPS, "runs": 1}
    return cache(lambda name: script("decode.ablation").measure_variant(name, tiny_moe, "50%", **lengths))


@pytest.fixture(scope="module")
def rows(script):
    return {row.name: row for row in script("decode.variants").variants()}


def test_whole_layers_reads_all_experts_for_every_token(measured):
    found = measured("whole layers")
    run, facts = found["warm"][0], found["model"]
    assert run["disk_bytes"] == STEPS * facts["expert_bytes"]
    assert run["hits"] == 0


def test_no_cache_reads_the_wanted_experts_for_every_token(measured):
    found = measured("no cache")
    run, facts = found["warm"][0], found["model"]
    assert run["misses"] == run["asked"] == STEPS * LAYERS * TOP_K
    assert run["disk_bytes"] == run["misses"] * facts["expert_bytes"] // facts["experts"]


def test_as_published_moves_nearly_every_miss_twice(measured):
    found = measured("as published")
    assert 0.5 < found["written_share"] < 1  # the first experts of all evict none
    assert found["warm"][0]["hits"] > 0


def test_lru_writes_nothing_back_and_hits_as_often_as_published(measured):
    lru, published = measured("lru"), measured("as published")
    assert lru["written_share"] == 0
    assert lru["warm"][0]["hits"] == published["warm"][0]["hits"]


def test_no_row_changes_the_logits(measured, rows):
    assert len({measured(name)["digest"] for name in rows}) == 1


def test_the_published_slots_have_every_load_done_when_computing_begins(rows, tiny_moe):
    row = rows["as published"]
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, moe_offload=row.config("50%"))
    row.apply(model)
    slots = experts_of(sparse_layers(model)[0][0]).cache.slots
    transfer = slots.start(ExpertId(0, 3), 0)
    assert transfer.is_done()
    assert transfer.finish() == transfer.finish() == model.moe_offload.plan.expert_bytes // (LAYERS * EXPERTS)
