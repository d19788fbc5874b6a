"""Assisted generation from small caches: the tokens of plain generation, and one load for all tokens of a draft."""

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from transformers_moe_offload import HqqFormat, OffloadConfig, PrefetchConfig
from transformers_moe_offload.bench.layers import sparse_layers

from .conftest import TINY_MOE

TEXT = torch.arange(11, 23).repeat(2)[None]
"""Says everything twice, so that there is something to look up."""

NEW_TOKENS = 32


def load(budget, **options):
    """In float32, where tokens that are verified together are not rounded to other ones."""
    config = OffloadConfig(cache_budget=budget, **options)
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32, moe_offload=config).eval()


def generate(model, **options):
    set_seed(0)
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    return model.generate(TEXT, attention_mask=torch.ones_like(TEXT), pad_token_id=2, **options)


def drafting(model, num_tokens):
    """A draft of as many tokens each time, however sure it is."""
    model.generation_config.update(
        num_assistant_tokens=num_tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    return model


@pytest.fixture(scope="module")
def expected():
    stock = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32, experts_implementation="eager")
    return generate(stock)


@pytest.fixture(scope="module")
def drafts():
    dense = AutoModelForCausalLM.from_pretrained(TINY_MOE.with_name("tiny-dense"), dtype=torch.float32)
    return {"dense": dense, "itself": load("100%", experts=HqqFormat(nbits=2, group_size=32))}


@pytest.mark.parametrize("prefetch", [None, PrefetchConfig(adaptive=False)], ids=["lru", "prefetch"])
@pytest.mark.parametrize("budget", ["1%", "12%", "50%"])
@pytest.mark.parametrize("num_tokens", [3, 10])
@pytest.mark.parametrize("source", ["lookup", "dense", "itself"])
def test_tokens_are_those_of_plain_generation(source, num_tokens, budget, prefetch, drafts, expected):
    model = load(budget, mmap=False, prefetch=prefetch)
    if source == "lookup":
        found = generate(model, prompt_lookup_num_tokens=num_tokens)
    else:
        found = generate(model, assistant_model=drafting(drafts[source], num_tokens))
    assert torch.equal(found, expected)


def test_a_draft_in_fewer_bits_saves_forwards_and_loads(drafts):
    model, forwards = load("25%", mmap=False), []
    model.register_forward_pre_hook(lambda *_: forwards.append(None))
    generate(model)
    plain, misses = len(forwards), model.moe_offload.stats().misses
    model.moe_offload.clear()
    model.moe_offload.reset_stats()
    generate(model, assistant_model=drafting(drafts["itself"], 5))
    assert len(forwards) - plain < 0.5 * plain
    assert model.moe_offload.stats().misses < 0.8 * misses


@pytest.mark.parametrize("budget", ["1%", "12%", "100%"])
@pytest.mark.parametrize("num_tokens", [2, 6, 21, 40])
def test_a_verification_loads_each_expert_that_any_token_wants_once(num_tokens, budget):
    """By one call and expert by expert, from a cache that is empty, and holds one expert, some, or all."""
    model, wanted = load(budget, mmap=False), []
    for module, _ in sparse_layers(model):
        module.register_forward_pre_hook(lambda _, args: wanted.append(args[1].unique().numel()))
    with torch.inference_mode():
        model(torch.arange(11, 11 + num_tokens)[None])
    stats = model.moe_offload.stats()
    assert (stats.asked, stats.misses) == (sum(wanted), sum(wanted))
    one = model.moe_offload.plan.expert_bytes // model.moe_offload.plan.num_experts
    assert stats.disk_bytes == sum(wanted) * one // 2, "stored in bfloat16"
