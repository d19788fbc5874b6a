"""A decode step by one call of the kernels does to cache, statistics and traces what it does expert by expert."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import HqqFormat, OffloadConfig
from transformers_moe_offload.bench.layers import sparse_layers
from transformers_moe_offload.hf.model.paths.fast import FastPath
from transformers_moe_offload.kernels import native
from transformers_moe_offload.tracing.replay import replay

from .conftest import TINY_MOE

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not compiled")

PROMPT = torch.arange(11, 23)[None]


def load(**options):
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(**options)).eval()


def generate(model, num_tokens=24):
    return model.generate(PROMPT, max_new_tokens=num_tokens, do_sample=False)


def counts(model):
    stats = model.moe_offload.stats()
    return stats.hits, stats.misses, stats.late_hits


@pytest.mark.parametrize("policy", ["lru", "slru", "lfu", "lfru", "sieve", "least_stale"])
@pytest.mark.parametrize("budget", ["30%", "60%", "100%"])
def test_hits_and_misses_are_those_of_visits(policy, budget):
    """A policy that is told of uses later, many at once, evicts as one that is told at once."""
    models = [load(cache_budget=budget, policy=policy, mmap=False) for _ in range(2)]
    for _ in range(2):
        generate(models[0])
        with models[1].moe_offload.trace():  # has every use told at once
            generate(models[1])
        assert counts(models[0]) == counts(models[1])
        for model in models:
            model.moe_offload.resize("20%")


def test_a_replay_of_its_trace_has_its_hits():
    model = load(cache_budget="40%", mmap=False)
    with model.moe_offload.trace() as trace:
        generate(model)
    (pool,) = model.moe_offload.plan.pools
    assert replay(trace, model.moe_offload.config.policy, pool.num_slots).hits == counts(model)[0]


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 21])
@pytest.mark.parametrize("experts", [None, HqqFormat(nbits=4, group_size=32, optimize=False)], ids=["dense", "4 bits"])
def test_logits_are_the_same_bits_wherever_experts_are(experts, num_tokens):
    options = [
        {"cache_budget": "100%"},
        {"cache_budget": "100%", "mmap": False},
        {"cache_budget": "15%", "mmap": False},
    ]
    if experts is not None:
        options = [{"cache_budget": "100%"}, {"cache_budget": "15%"}]
    found = []
    for one in options:
        model = load(experts=experts, arithmetic="int8", **one)
        with torch.inference_mode():
            found += [model(torch.arange(11, 11 + num_tokens)[None]).logits for _ in range(2)]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("budget", ["15%", "100%"])
def test_drafted_tokens_are_verified_by_it(budget, monkeypatch):
    """The longest draft has 20 tokens by default."""
    model = load(cache_budget=budget, mmap=False)
    seen = []
    monkeypatch.setattr(FastPath, "forward", lambda path, call: seen.append(len(call.inputs[0])))
    with torch.inference_mode():
        for num_tokens in (2, 9, 21):
            model(torch.arange(11, 11 + num_tokens)[None])
    assert not seen


def test_prefetching_goes_on_beside_it():
    expected = generate(load(cache_budget="30%", mmap=False))
    model = load(cache_budget="30%", mmap=False, prefetch={"adaptive": False})
    assert torch.equal(generate(model), expected)
    assert model.moe_offload.stats().prefetch_used > 0


def test_layers_whose_activation_is_replaced_take_another_path():
    model = load(cache_budget="100%")
    module, _ = next(iter(sparse_layers(model)))
    with torch.inference_mode():
        before = model(PROMPT[:, :1]).logits
        module.act_fn = torch.nn.ReLU()
        after = model(PROMPT[:, :1]).logits
    assert not torch.equal(before, after)


def test_hooks_of_all_modules_see_activations():
    model, seen = load(cache_budget="100%"), []
    module, _ = next(iter(sparse_layers(model)))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda called, *_: seen.append(called))
    try:
        with torch.inference_mode():
            model(PROMPT[:, :1])
    finally:
        handle.remove()
    assert any(called is module.act_fn for called in seen)


def test_threads_share_a_model():
    model = load(cache_budget="40%", mmap=False)
    expected = generate(model)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(one, expected) for one in pool.map(lambda _: generate(model), range(8)))


def test_nothing_runs_once_a_step_is_over():
    """Threads that wait for work sleep: a second later the process takes no time of a processor."""
    model = load(cache_budget="100%")
    generate(model)
    time.sleep(1)
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.05
