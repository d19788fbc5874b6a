"""Adapters on disk are experts like any others: cached, prefetched, and with the results of those in memory."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.mixtures import TARGETS, TOKENS, load, logits, mixture, saved, write_adapter
from stores import put_back
from transformers_moe_offload import CheckpointError, OffloadConfig, PrefetchConfig
from transformers_moe_offload.models.adapter_moe.adapter_folders import WEIGHTS_NAME

OPTIONS = {"target_modules": TARGETS, "rank": 8}
WAYS = [(), (("mmap", False),), (("mmap", False), ("direct_io", True))]


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
    with put_back(file) as whole:
        file.write_bytes(whole[:-100])
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
            logits(model)
    assert torch.equal(logits(model), logits(load(folder)))


def test_a_mixture_does_not_depend_on_the_working_directory(adapters, tmp_path, monkeypatch):
    """Nor on what is under its relative path in the next one: adapters of the same shapes, with other weights."""
    for number, place in enumerate(["here", "elsewhere"]):
        own = [write_adapter(tmp_path / place / "lora" / name, 10 * number + n) for n, name in enumerate("ab")]
        saved(mixture(own), tmp_path / place / "model")
    monkeypatch.chdir(tmp_path / "here")
    expected = logits(load(Path("model")))
    in_memory = load(Path("model"))
    offloaded = {options: load(Path("model"), moe_offload=OffloadConfig(**dict(options))) for options in WAYS}
    restored = load(Path("model"), moe_offload=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for number, model in enumerate([in_memory, *offloaded.values(), copy.deepcopy(offloaded[()])]):
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(load(saved(model, tmp_path / f"saved {number}"))), expected)
    assert torch.equal(logits(restored.moe_offload.restore()), expected)


def test_an_adapter_that_was_replaced_by_one_of_the_same_size_is_refused(tmp_path):
    own = [write_adapter(tmp_path / "lora" / name, n) for n, name in enumerate("ab")]
    folder = saved(mixture(own), tmp_path / "model")
    in_memory, offloaded = load(folder), load(folder, moe_offload=OffloadConfig(mmap=False))
    expected = logits(in_memory)
    file = folder / "adapters" / "b" / WEIGHTS_NAME
    file.rename(tmp_path / "first")
    other = write_adapter(tmp_path / "other", 7) / WEIGHTS_NAME
    shutil.copyfile(other, file)
    assert file.stat().st_size == (tmp_path / "first").stat().st_size
    for work in (lambda: logits(offloaded), lambda: offloaded.save_pretrained(tmp_path / "saved")):
        with pytest.raises(CheckpointError, match=r"b/adapter_model\.safetensors is not what it was"):
            work()
    assert torch.equal(logits(load(saved(in_memory, tmp_path / "from memory"))), expected)
    (tmp_path / "first").replace(file)
    assert torch.equal(logits(offloaded), expected)
