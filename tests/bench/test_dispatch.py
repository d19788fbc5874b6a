"""A layer is taken apart without changing what it computes, and with every expert resident."""

import pytest
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.dispatch import dispatch
from transformers_moe_offload.kernels import native

from .conftest import TINY_MOE

PARTS = {"whole", "grouping", "visit", "arithmetic", "combine"}


@pytest.fixture
def expert_by_expert(monkeypatch):
    """A model whose layers are not computed by one call."""
    monkeypatch.setattr(native, "library", lambda: None)
    loaded = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="40%", mmap=False))
    yield loaded.eval()
    loaded.moe_offload.close()


def test_every_part_of_every_layer_is_timed_with_its_experts_resident(expert_by_expert, passage):
    found = dispatch(expert_by_expert, passage.sequences(1, 8), passes=2)
    assert found["us_per_layer"].keys() == PARTS | {"overhead", "rest"}
    assert all(found["us_per_layer"][name] > 0 for name in PARTS)
    assert found["layers"] == 8
    assert found["resident_share"] == 1


def test_overhead_and_rest_are_what_the_parts_leave(expert_by_expert, passage):
    us = dispatch(expert_by_expert, passage.sequences(1, 8), passes=2)["us_per_layer"]
    assert us["overhead"] == pytest.approx(us["whole"] - us["arithmetic"])
    assert us["rest"] == pytest.approx(us["overhead"] - us["grouping"] - us["visit"] - us["combine"])


@pytest.mark.skipif(native.library() is None, reason="the kernels were not compiled")
def test_a_layer_that_one_call_computes_has_no_parts_but_that_call(model, passage):
    us = dispatch(model, passage.sequences(1, 8), passes=2)["us_per_layer"]
    assert us["overhead"] == us["rest"] == pytest.approx(us["whole"] - us["arithmetic"])
    assert us["grouping"] is us["visit"] is us["combine"] is None


def test_a_cache_too_small_for_one_step_is_told(passage):
    config = OffloadConfig(cache_budget="10%", mmap=False)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)
    assert dispatch(model, passage.sequences(1, 8), passes=1)["resident_share"] < 1


def test_layers_with_the_models_own_arithmetic_are_timed_whole(passage):
    config = OffloadConfig(cache_budget="100%", arithmetic="exact")
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)
    us = dispatch(model, passage.sequences(1, 8), passes=1)["us_per_layer"]
    assert us["whole"] > 0
    assert us["arithmetic"] is None


def test_measuring_leaves_no_hook_behind(model, passage):
    dispatch(model, passage.sequences(1, 8), passes=1)
    assert not any(module._forward_pre_hooks for module in model.modules())
