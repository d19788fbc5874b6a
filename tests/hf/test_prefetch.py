"""Prefetching changes when experts come in, and nothing else."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import ConfigError, OffloadConfig, PrefetchConfig, register_predictor
from transformers_moe_offload.prefetch.predictors import base

from .conftest import TINY_MOE


def load(prefetch, budget="25%", **options):
    config = OffloadConfig(cache_budget=budget, prefetch=prefetch, **options)
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)


def generate(model, prompt, tokens=24, **options):
    return model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=2, **options
    )


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(3, 4000, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(prompt):
    return generate(load(None), prompt)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("budget", ["4%", "25%", "100%"])
@pytest.mark.parametrize("predictor", ["next_router", "last_token", "transition"])
def test_tokens_are_the_same_under_every_predictor(predictor, budget, mmap, prompt, expected):
    prefetch = PrefetchConfig(predictor=predictor, lookahead=2, min_confidence=0.2, adaptive=False)
    assert torch.equal(generate(load(prefetch, budget, mmap=mmap), prompt), expected)


def test_experts_come_in_ahead_of_demand_and_are_used(prompt):
    off, on = load(None), load(PrefetchConfig(adaptive=False))
    for model in (off, on):
        generate(model, prompt)
    without, stats = off.moe_offload.stats(), on.moe_offload.stats()
    assert without.prefetch_used == without.prefetch_wasted == 0
    assert stats.prefetch_used > stats.prefetch_wasted
    assert stats.misses < without.misses
    assert stats.asked == without.asked


def test_beams_and_batches_are_prefetched_for_like_single_sequences(prompt):
    model = load(PrefetchConfig(adaptive=False))
    assert torch.equal(generate(model, prompt, num_beams=4), generate(load(None), prompt, num_beams=4))
    assert model.moe_offload.stats().prefetch_used > 0


def test_gradients_are_those_without_prefetching(prompt):
    grads = []
    for prefetch in (None, PrefetchConfig(adaptive=False)):
        model = load(prefetch)
        model(input_ids=prompt, labels=prompt).loss.backward()
        grads.append(model.model.layers[0].mlp.gate.weight.grad)
    assert torch.equal(*grads)


def test_a_predictor_of_ones_own_is_asked(prompt, expected, monkeypatch):
    monkeypatch.setattr(base, "_PREDICTORS", deepcopy(base._PREDICTORS))
    asked = []

    @register_predictor("nobody")
    class Nobody:
        def __init__(self, layers, routers):
            assert [shape.top_k for shape in layers] == [4] * 8
            assert sorted(routers) == list(range(8))

        def observe(self, layer, wanted):
            pass

        def predict(self, layer, targets, hidden):
            asked.append((layer, hidden.shape))
            return []

    assert torch.equal(generate(load(PrefetchConfig(predictor="nobody", adaptive=False)), prompt), expected)
    assert set(asked) == {(layer, (1, 192)) for layer in range(8)}


def test_an_unknown_predictor_lists_the_choices():
    with pytest.raises(
        ConfigError, match=r"predictor='oracle' is not a known predictor; choose one of \[.*'last_token'"
    ):
        load(PrefetchConfig(predictor="oracle"))
