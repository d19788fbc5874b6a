"""`model.moe_offload.trace()` and `.warm()`."""

import tempfile

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import ConfigError, MoeOffloadError, OffloadConfig
from transformers_moe_offload.tracing import Trace, replay
from zoo.build import build

from .conftest import TINY_MOE


def load(budget="25%", **options):
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget=budget, **options))


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(3, 4000, (1, 12), generator=torch.Generator().manual_seed(0))


def generate(model, prompt, tokens=12):
    return model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=2)


def test_a_trace_holds_every_visit_and_its_replay_has_the_same_hits(prompt):
    model = load()
    with model.moe_offload.trace() as trace:
        generate(model, prompt)
    stats = model.moe_offload.stats()
    assert len(trace.visits) == 12 * 8
    assert trace.num_asked == stats.asked
    num_slots = model.moe_offload.plan.num_slots
    replayed = replay(trace, "lru", num_slots)
    assert [s.hits for s in replayed.per_layer.values()] == [s.hits for s in stats.per_layer.values()]


def test_a_trace_knows_the_tokens_of_each_forward(prompt):
    model = load()
    with model.moe_offload.trace() as trace, torch.no_grad():
        generate(model, prompt, 3)
        model(prompt[:, :5])  # not by name
        model(inputs_embeds=model.get_input_embeddings()(prompt[:, :7].repeat(2, 1)))
        model.model(prompt)  # below what is announced
    assert trace.step_tokens == [12, 1, 1, 5, 14, 0]


def test_steps_of_an_encoder_decoder_have_the_tokens_of_what_alone_is_run():
    model = build("switch_transformers")
    ids = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    config = OffloadConfig(cache_budget="100%")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder, moe_offload=config)
        model.config.decoder_start_token_id = 0
        with model.moe_offload.trace() as trace, torch.no_grad():
            encoded = model.get_encoder()(ids)
            model(encoder_outputs=encoded, decoder_input_ids=ids[:, :1])
            model(input_ids=ids, decoder_input_ids=ids[:, :1])
            model(input_ids=ids[:, :1], labels=ids)
    assert trace.step_tokens == [0, 1, 0, 0]


def test_what_happens_after_the_block_is_not_recorded(prompt):
    model = load()
    with model.moe_offload.trace() as trace:
        generate(model, prompt, 2)
    length = len(trace.visits)
    generate(model, prompt, 2)
    assert len(trace.visits) == length


def test_a_trace_goes_on_through_a_change_of_dtype(prompt):
    model = load()
    with model.moe_offload.trace() as trace:
        generate(model, prompt, 2)
        model.to(torch.float32)
        generate(model, prompt, 2)
    assert len(trace.visits) == 4 * 8


def test_two_traces_at_once_are_one_too_many():
    model = load()
    with model.moe_offload.trace(), pytest.raises(MoeOffloadError, match="traced already"), model.moe_offload.trace():
        pass
    with model.moe_offload.trace() as trace:
        assert isinstance(trace, Trace)


def test_a_warm_cache_hits_at_once(prompt):
    model = load("100%")
    with model.moe_offload.trace() as trace:
        generate(model, prompt)
    again = load("100%")
    again.moe_offload.warm(trace)
    expected = generate(model, prompt)
    assert torch.equal(generate(again, prompt), expected)
    assert again.moe_offload.stats().misses == 0


def test_warming_fills_free_slots_with_the_most_used_of_each_layer():
    model = load("25%")  # 32 slots for 8 layers
    names = [layer for layer in model.moe_offload.stats().per_layer]
    model.moe_offload.warm({name: [expert % 5 for expert in range(16)] for name in names})
    (cache,) = model.moe_offload._caches.all()
    assert sorted({e.expert for e in cache.residency.residents}) == [3, 4, 9, 14]
    assert [cache.residency.count(layer) for layer in range(8)] == [4] * 8


def test_a_histogram_of_another_model_is_refused():
    model = load()
    with pytest.raises(ConfigError, match=r"no sparse layer 'model\.layers\.99'; its first is 'model\.layers\.0\.mlp"):
        model.moe_offload.warm({"model.layers.99": [1]})
    with pytest.raises(ConfigError, match=r"3 counts for the experts of model\.layers\.0\.mlp\.experts, which has 16"):
        model.moe_offload.warm({"model.layers.0.mlp.experts": [1, 2, 3]})
