"""Adapters on disk are experts like any others: cached, prefetched, and with the results of those in memory."""

import pytest
import torch
from safetensors.torch import load_file

from models.mixtures import TARGETS, TOKENS, load, logits, mixture, saved
from transformers_moe_offload import CheckpointError, OffloadConfig, PrefetchConfig

OPTIONS = {"target_modules": TARGETS, "rank": 8}


@pytest.fixture(scope="module", params=["ffn", "linear", "model"])
def folder(request, adapters, tmp_path_factory):
    return saved(mixture(adapters, router_per=request.param, **OPTIONS), tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize("config", [{"cache_budget": "100%"}, {"cache_budget": "40%"}, {"mmap": False}])
def test_logits_and_tokens_are_those_of_the_plain_model(folder, config):
    plain, offloaded = load(folder), load(folder, moe_offload=OffloadConfig(**config))
    assert torch.equal(logits(offloaded), logits(plain))
    for options in ({}, {"num_beams": 3}):
        assert torch.equal(
            offloaded.generate(TOKENS, max_new_tokens=5, **options), plain.generate(TOKENS, max_new_tokens=5, **options)
        )
    stats = offloaded.moe_offload.stats()
    assert stats.hits > 0
    assert stats.misses > 0
    assert stats.disk_bytes > 0


def test_prefetching_changes_nothing(folder):
    config = OffloadConfig(cache_budget="40%", prefetch=PrefetchConfig(predictor="last_token"))
    offloaded, plain = load(folder, moe_offload=config), load(folder)
    assert torch.equal(offloaded.generate(TOKENS, max_new_tokens=6), plain.generate(TOKENS, max_new_tokens=6))


def test_routers_get_the_gradients_of_the_plain_model(folder):
    grads = []
    for options in ({}, {"moe_offload": OffloadConfig(cache_budget="40%")}):
        model = load(folder, **options)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if "router" in name})
    assert grads[0]
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_an_offloaded_mixture_is_saved_with_its_adapters(folder, tmp_path):
    saved(load(folder, moe_offload=True), tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(load(folder)))
    for adapter in (tmp_path / "adapters").iterdir():
        original = load_file(folder / "adapters" / adapter.name / "adapter_model.safetensors")
        copied = load_file(adapter / "adapter_model.safetensors")
        assert all(torch.equal(copied[name], original[name]) for name in original)


def test_restoring_brings_all_adapters_into_memory(folder):
    model = load(folder, moe_offload=True)
    expected = logits(model)
    restored = model.moe_offload.restore()
    assert "language_model.model.layers.0.mlp.up_proj.experts.lora_A" in restored.state_dict()
    assert torch.equal(logits(restored), expected)


def test_an_adapter_that_shrank_is_an_error_when_it_is_needed(adapters, tmp_path):
    folder = saved(mixture(adapters, **OPTIONS), tmp_path)
    model = load(folder, moe_offload=OffloadConfig(mmap=False))
    file = folder / "adapters" / "wide" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        logits(model)
    file.write_bytes(whole)
    assert torch.equal(logits(model), logits(load(folder)))
