"""Texts in an order in which the cache serves more, with the same results."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_moe_offload import ConfigError, OffloadConfig, cache_stats, routing
from transformers_moe_offload.routing.calibration import token_losses

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_MOE = EXAMPLES / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def texts():
    """Short pieces of prose and code in turns."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    lines = [(EXAMPLES / "evaluation" / f"{d}.jsonl").read_text().splitlines()[:8] for d in ("prose", "python")]
    mixed = [line for pair in zip(*lines, strict=True) for line in pair]
    return [tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"][:, :6] for line in mixed]


def evaluated(model, texts, order):
    """Losses by text, and how many experts were resident when they were asked for."""
    model.moe_offload.reset_stats()
    losses = {number: token_losses(model, texts[number]) for number in order}
    return losses, cache_stats(model).hits


def test_an_order_by_reuse_has_every_text_once_more_hits_and_the_same_losses(texts):
    config = OffloadConfig(cache_budget="40%", mmap=False)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)
    with routing.record_routing(model) as recorder:
        evaluated(model, texts, range(len(texts)))
    order = routing.reuse_order(recorder.trace)
    assert sorted(order) == list(range(len(texts)))
    as_given, hits = evaluated(model, texts, range(len(texts)))
    ordered, more_hits = evaluated(model, texts, order)
    assert all(torch.equal(as_given[number], ordered[number]) for number in as_given)
    assert more_hits > hits


def test_texts_of_unknown_tokens_have_no_order(plain):
    with routing.record_routing(plain) as recorder, torch.no_grad():
        plain(inputs_embeds=torch.zeros(1, 3, plain.config.hidden_size))
    with pytest.raises(ConfigError, match="holds no text"):
        routing.reuse_order(recorder.trace)


def test_an_order_by_tokens_has_every_text_once_more_hits_and_the_same_losses(texts):
    config = OffloadConfig(cache_budget="40%", mmap=False)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)
    order = routing.token_order([text[0].tolist() for text in texts])
    as_given, hits = evaluated(model, texts, range(len(texts)))
    ordered, more_hits = evaluated(model, texts, order)
    assert all(torch.equal(as_given[number], ordered[number]) for number in as_given)
    assert more_hits > hits


@given(st.lists(st.lists(st.integers(0, 10**6), max_size=4), max_size=12), st.integers(1, 5))
def test_an_order_by_tokens_is_a_permutation_of_any_texts(texts, at_a_time):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers_moe_offload.routing.order._AT_A_TIME", at_a_time)
        assert sorted(routing.token_order(texts)) == list(range(len(texts)))


def test_a_text_is_followed_by_the_one_that_has_most_tokens_in_common():
    order = routing.token_order([[1, 2, 3], [7, 8, 9], [3, 2, 4], [9, 8, 5]])
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
