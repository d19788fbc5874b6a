"""The stock `generate`, in all its modes, gives the tokens it gives with the plain model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from transformers_moe_offload import OffloadConfig

from .conftest import TINY_MOE


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MOE, padding_side="left")


@pytest.fixture(scope="module")
def stock():
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, experts_implementation="eager")


@pytest.fixture(scope="module", params=["20%", "100%"])
def offloaded(request):
    config = OffloadConfig(cache_budget=request.param, arithmetic="exact")
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"num_beams": 5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "scores": {
        "do_sample": False,
        "output_scores": True,
        "output_router_logits": True,
        "return_dict_in_generate": True,
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_the_plain_models(mode, stock, offloaded, tokenizer):
    batch = tokenizer(["def main(argv):\n"], return_tensors="pt")
    assert torch.equal(generate(offloaded, batch, **MODES[mode]), generate(stock, batch, **MODES[mode]))


def test_a_padded_batch_of_eight(stock, offloaded, tokenizer):
    prompts = ["#include <", "import os", "The", "class A:", "return the value of", "static int", "for x in", "a"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert torch.equal(generate(offloaded, batch), generate(stock, batch))


def test_as_target_and_as_assistant_of_assisted_decoding(stock, offloaded, tokenizer):
    batch = tokenizer(["def main(argv):\n"], return_tensors="pt")
    # Verifying several tokens at once rounds differently than one at a time, so the stock pair is what to equal.
    expected = generate(stock, batch, assistant_model=stock)
    assert torch.equal(generate(offloaded, batch, assistant_model=stock), expected)
    assert torch.equal(generate(stock, batch, assistant_model=offloaded), expected)


def test_a_streamer_sees_every_token(offloaded, tokenizer):
    class Count:
        tokens = 0

        def put(self, value):
            self.tokens += value.numel()

        def end(self):
            pass

    count = Count()
    batch = tokenizer(["import"], return_tensors="pt")
    out = offloaded.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, streamer=count)
    assert count.tokens == out.numel()


def test_a_second_decode_hits_what_the_first_one_loaded(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="100%"))
    batch = tokenizer(["import sys"], return_tensors="pt")
    generate(model, batch)
    model.moe_offload.reset_stats()
    generate(model, batch)
    stats = model.moe_offload.stats()
    assert stats.misses == 0
    assert stats.hits > 0
    assert stats.disk_bytes == 0


def generate(model, batch, **mode) -> torch.Tensor:
    set_seed(0)
    config = GenerationConfig(
        **{"max_new_tokens": 12, "pad_token_id": 0} | {k: v for k, v in mode.items() if k != "assistant_model"}
    )
    assistant = {"assistant_model": mode["assistant_model"]} if "assistant_model" in mode else {}
    out = model.generate(**batch, generation_config=config, **assistant)
    return out if isinstance(out, torch.Tensor) else out.sequences
