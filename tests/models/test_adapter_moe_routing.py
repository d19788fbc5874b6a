"""Routers of mixtures of adapters can be swapped and recorded like any other, adapters in memory or on disk."""

import pytest
import torch

from models.mixtures import TARGETS, TOKENS, load, logits, mixture, saved
from transformers_moe_offload import OffloadConfig, UnsupportedModelError, routing

STRATEGIES = {
    "top_k": {"k": 1},
    "top_p": {"p": 0.1},
    "random": {},
    "gumbel": {},
    "noise": {"std": 3.0},
    "hash": {},
    "expert_choice": {},
    "linear_assignment": {},
    "fixed": {"experts": [2]},
    "drop": {"experts": [0]},
}
ROUTERS = {"ffn": 6, "linear": 10, "model": 1}
"""Where routers are, and how many there are: two decoder layers, with five linear layers in each."""


@pytest.fixture(scope="module", params=ROUTERS)
def folder(request, adapters, tmp_path_factory):
    options = {"router_per": request.param, "target_modules": TARGETS, "rank": 8, "num_experts_per_tok": 2}
    return saved(mixture(adapters, **options), tmp_path_factory.mktemp(request.param) / request.param)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "arrow", "uniform"])
def test_every_strategy_works_whatever_the_scoring_and_a_reset_is_bit_identical(adapters, folder, scoring):
    sizes = {"router_per": folder.name, "target_modules": TARGETS, "rank": 8}
    model = mixture(adapters, scoring=scoring, num_experts_per_tok=3 if scoring == "uniform" else 2, **sizes)
    own = logits(model)
    with routing.set_routing(model, "top_k"):
        assert torch.equal(logits(model), own)
    for strategy in ("top_k", "fixed") if scoring == "uniform" else STRATEGIES:  # uniform takes all that there are
        change = routing.set_routing(model, strategy, **STRATEGIES[strategy])
        with change, routing.record_routing(model) as recorder:
            swapped = logits(model)
        assert torch.isfinite(swapped).all()
        assert not torch.equal(swapped, own), strategy
        for rows in recorder.trace.rows(0):
            weights = rows.weights.sum(axis=1)[(rows.experts >= 0).any(axis=1)]
            assert scoring == "sigmoid" or weights == pytest.approx(1)
    assert torch.equal(logits(model), own)


def test_adapters_on_disk_follow_a_strategy_as_those_in_memory(folder):
    plain, offloaded = load(folder), load(folder, moe_offload=OffloadConfig(cache_budget="40%"))
    for strategy, options in STRATEGIES.items():
        with routing.set_routing(plain, strategy, **options), routing.set_routing(offloaded, strategy, **options):
            assert torch.equal(logits(offloaded), logits(plain)), strategy
    with routing.set_routing(plain, "random"), routing.set_routing(offloaded, "random"):
        for beams in (1, 3):
            written = [model.generate(TOKENS, max_new_tokens=4, num_beams=beams) for model in (plain, offloaded)]
            assert torch.equal(*written)


def test_a_recording_knows_its_routers_and_asks_for_the_adapters_that_the_cache_was_asked_for(folder):
    model = load(folder, moe_offload=OffloadConfig(cache_budget="40%"))
    with routing.record_routing(model) as recorder, model.moe_offload.trace() as visits:
        model.generate(TOKENS, max_new_tokens=5, min_new_tokens=5)
    trace = recorder.trace
    assert len(trace.routers) == ROUTERS[folder.name]
    assert {facts.top_k for facts in trace.routers} == {2}
    assert sorted(layer for facts in trace.routers for layer in facts.layers) == [*range(10)]
    asked = trace.to_cache_trace()
    assert asked.layer_names == visits.layer_names
    assert [(one.layer, {*one.wanted}) for one in asked.visits] == [(one.layer, {*one.wanted}) for one in visits.visits]


def test_a_model_that_is_told_one_adapter_has_no_choice_to_record(folder):
    model = load(folder)
    with model.taking_only(1), routing.record_routing(model), pytest.raises(UnsupportedModelError, match="watch"):
        logits(model)
