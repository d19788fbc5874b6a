"""Decoding on the device gives what decoding on the host gives, whatever is resident, and never asks the host.

Tests marked `gpu` run on a GPU where there is one, and by `test_interpreted.py` anywhere: there Triton interprets its
kernels with numpy.
"""

import copy
import importlib.util
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LogitsProcessor

from interpreted import DEVICE, IS_INTERPRETED
from transformers_moe_offload import ExpertFormats, HqqFormat, MoeOffloadError, OffloadConfig
from transformers_moe_offload.hf.cuda_graphs.no_host_sync import HostSyncError, without_host
from transformers_moe_offload.kernels.gpu import missing
from transformers_moe_offload.routing import record_routing, set_routing

from .decoding import NEW_TOKENS, generate, load, prompt

gpu = pytest.mark.gpu
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums in another order."""


@pytest.fixture(scope="module")
def on_the_host(small_checkpoint):
    """What the host's way answers to the prompt."""
    return generate(load(small_checkpoint, device=DEVICE), prompt())


@gpu
def test_tokens_are_the_hosts_and_logits_the_same_bits_at_every_cache_size(small_checkpoint, on_the_host):
    tokens, logits = on_the_host
    seen, hits = [], []
    for budget in ("13%", "50%", "100%"):
        model = load(small_checkpoint, "device", budget, device=DEVICE)
        found, theirs = generate(model, prompt())
        assert torch.equal(found, tokens)
        torch.testing.assert_close(theirs, logits, **CLOSE)
        seen.append(theirs)
        hits.append(model.moe_offload.stats().hits)
        plan = model.moe_offload.plan
        assert plan.pools[0].arena_bytes == plan.expert_bytes
        assert "page-locked" in str(plan)
    assert all(torch.equal(other, seen[0]) for other in seen)
    assert 0 <= hits[0] < hits[1] < hits[2]


@gpu
def test_what_is_asked_for_is_counted_as_on_the_host(small_checkpoint):
    asked = []
    for decode in ("host", "device"):
        model = load(small_checkpoint, decode, "100%", device=DEVICE)
        generate(model, prompt(2, 3), max_new_tokens=3)
        asked.append({name: layer.asked for name, layer in model.moe_offload.stats().per_layer.items()})
        model.moe_offload.reset_stats()
        assert model.moe_offload.stats().asked == 0
    assert asked[0] == asked[1]


@gpu
def test_no_sparse_layer_waits_for_the_device_with_16_tokens_and_every_one_does_with_17(small_checkpoint):
    model = load(small_checkpoint, "device", "25%", device=DEVICE)
    decoding = model.moe_offload.decoding
    hidden = torch.randn(17, 1, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for layer in model.model.layers:
        with torch.no_grad():
            expected = layer.mlp(hidden[:16])
            with decoding.capturing(), without_host():  # what the host does between two forwards is left out
                found = layer.mlp(hidden[:16])
            assert torch.equal(found, expected)
            with pytest.raises(HostSyncError), without_host():
                layer.mlp(hidden)
            torch.testing.assert_close(layer.mlp(hidden)[:16], expected, **CLOSE)


@gpu
def test_routers_that_prefer_residents_find_them_in_the_table_without_the_host(small_checkpoint):
    misses, model = [], load(small_checkpoint, "device", "50%", device=DEVICE)
    for strength in (0.0, 1.0):
        model.moe_offload.clear()
        model.moe_offload.reset_stats()
        with set_routing(model, "cache_aware", strength=strength):
            generate(model, prompt(), max_new_tokens=8, min_new_tokens=8)
            stats = model.moe_offload.stats()
            misses.append(stats.misses)
            assert (stats.follows_cache is not None) == (strength > 0)
            hidden = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
            with torch.no_grad(), model.moe_offload.decoding.capturing(), without_host():
                model.model.layers[0].mlp(hidden)
    assert misses[1] < misses[0]


@gpu
def test_beams_are_the_hosts(small_checkpoint):
    options = {"num_beams": 3, "max_new_tokens": 3, "length_penalty": 0.0}
    tokens, _ = generate(load(small_checkpoint, device=DEVICE), prompt(), **options)
    found, _ = generate(load(small_checkpoint, "device", device=DEVICE), prompt(), **options)
    assert torch.equal(found, tokens)


class _Resizes(LogitsProcessor):
    def __init__(self, model, budgets):
        self._model, self._budgets = model, iter(budgets)

    def __call__(self, input_ids, scores):
        self._model.moe_offload.resize(next(self._budgets))
        return scores


@gpu
def test_a_cache_that_is_resized_during_a_generation_changes_nothing(small_checkpoint, on_the_host):
    model = load(small_checkpoint, "device", "50%", device=DEVICE)
    _, logits = generate(model, prompt())
    resizes = _Resizes(model, ["100%", "13%", "25%", "50%"])
    tokens, meanwhile = generate(model, prompt(), logits_processor=[resizes])
    assert torch.equal(tokens, on_the_host[0])
    assert torch.equal(meanwhile, logits)
    assert model.moe_offload.plan.num_slots == 4


@gpu
def test_threads_that_generate_at_once_get_what_they_get_one_after_the_other(small_checkpoint):
    prompts = [prompt(seed=seed) for seed in (1, 2)]
    expected = [generate(load(small_checkpoint, "device", device=DEVICE), ids) for ids in prompts]
    assert not torch.equal(expected[0][1], expected[1][1])
    model = load(small_checkpoint, "device", "25%", device=DEVICE)
    both = threading.Barrier(2, timeout=60)

    def wait(*_):
        """Before either comes to the second sparse layer, each thread has been through the first."""
        both.wait()

    waiting = model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda ids: generate(model, ids), prompts))
    waiting.remove()
    for (tokens, logits), (expected_tokens, expected_logits) in zip(found, expected, strict=True):
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(logits, expected_logits)
    asked = model.moe_offload.stats().asked
    model.moe_offload.reset_stats()
    for ids in prompts:
        generate(model, ids)
    assert model.moe_offload.stats().asked == asked


@gpu
def test_copies_closed_and_restored_models_do_what_they_do_on_the_host(small_checkpoint, on_the_host):
    model = load(small_checkpoint, "device", device=DEVICE)
    _, logits = generate(model, prompt())
    twin = copy.deepcopy(model)
    model.moe_offload.close()
    with pytest.raises(MoeOffloadError, match="was closed"):
        model(prompt(1, 1).to(DEVICE))
    assert torch.equal(generate(twin, prompt())[1], logits)
    plain = twin.moe_offload.restore()
    tokens, restored = generate(plain, prompt())
    assert torch.equal(tokens, on_the_host[0])
    torch.testing.assert_close(restored, logits, **CLOSE)


@gpu
def test_gradients_are_the_hosts(small_checkpoint):
    grads = []
    for decode in ("host", "device"):
        model = load(small_checkpoint, decode, device=DEVICE)
        ids = prompt(1, 4).to(DEVICE)
        model(ids, labels=ids).loss.backward()
        grads.append(model.model.layers[0].mlp.gate.weight.grad)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


@gpu
def test_adapters_on_experts_and_traces_have_the_host_compute(small_checkpoint, caplog):
    from peft import LoraConfig, get_peft_model

    caplog.set_level(logging.INFO, "transformers_moe_offload")
    ids = prompt(1, 2).to(DEVICE)
    found = []
    for decode in ("host", "device"):
        model = load(small_checkpoint, decode, device=DEVICE)
        with torch.no_grad():
            with model.moe_offload.trace() as trace:
                traced = model(ids).logits
            assert sum(map(sum, trace.counts().values())) > 0
            options = {"target_parameters": ["mlp.experts.gate_up_proj"], "init_lora_weights": False}
            torch.manual_seed(0)
            adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], **options))(ids).logits
        assert not torch.equal(adapted, traced)
        found.append((traced, adapted))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert "while a model is traced the host has to know its routing" in caplog.text
    assert "experts to which adapters add are computed one by one" in caplog.text


@gpu
def test_routing_strategies_and_recordings_work(small_checkpoint):
    ids = prompt(1, 3).to(DEVICE)
    seen = []
    for decode in ("host", "device"):
        model = load(small_checkpoint, decode, device=DEVICE)
        with torch.no_grad(), set_routing(model, "top_k", k=1), record_routing(model) as recorder:
            logits = model(ids).logits
        seen.append((logits, recorder.trace.to_cache_trace().counts()))
        assert all(sum(counts) > 0 for counts in seen[-1][1].values())
    torch.testing.assert_close(seen[0][0], seen[1][0], **CLOSE)
    assert seen[0][1] == seen[1][1]


@gpu
@pytest.mark.parametrize("nbits", [4, 3])
def test_quantized_experts_are_read_where_they_are(packable_checkpoint, nbits):
    ids = prompt(1, 2).to(DEVICE)
    format = HqqFormat(nbits=nbits, group_size=16)
    with torch.no_grad():
        expected = load(packable_checkpoint, experts=format, device=DEVICE)(ids).logits
        found = [
            load(packable_checkpoint, "device", b, experts=format, device=DEVICE)(ids).logits for b in ("13%", "100%")
        ]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected, **CLOSE)


@gpu
def test_a_layer_whose_experts_have_several_formats_uses_the_same_slots_through_the_host(packable_checkpoint, caplog):
    four, eight = HqqFormat(nbits=4, group_size=16), HqqFormat(nbits=8, group_size=16)
    formats = ExpertFormats(default=four, hot=eight, hot_experts={"0": [1]})
    ids = prompt(1, 2).to(DEVICE)
    with torch.no_grad():
        expected = load(packable_checkpoint, experts=formats, device=DEVICE)(ids).logits
        models = [
            load(packable_checkpoint, "device", budget, experts=formats, device=DEVICE) for budget in ("20%", "100%")
        ]
        found = [model(ids).logits for model in models]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected, **CLOSE)
    assert len(models[0].moe_offload.plan.pools) == 1
    assert "1 of 2 sparse layers, model.layers.0.mlp.experts first, decode on the host: some of its" in caplog.text


@gpu
def test_too_little_host_memory_is_said_with_both_numbers_and_the_host_decodes(small_checkpoint, on_the_host, caplog):
    model = load(small_checkpoint, "device", device=DEVICE, host_budget="1KiB")
    assert "all experts take 12,288 bytes of page-locked memory, and host_budget='1KiB' allows 1,024" in caplog.text
    assert model.moe_offload.plan.arena_bytes == 0
    assert torch.equal(generate(model, prompt())[1], on_the_host[1])


@gpu
def test_what_cannot_be_on_the_device_is_said_once(small_checkpoint, caplog):
    caplog.set_level(logging.INFO, "transformers_moe_offload")
    model = load(small_checkpoint, "device", device=DEVICE)
    with torch.no_grad():
        for _ in range(2):
            model(prompt().to(DEVICE))
    assert caplog.text.count("forwards of more than 16 tokens are computed expert by expert") == 1
    load(small_checkpoint, "device", device=DEVICE, arithmetic="exact")
    assert "decode='device' has no effect: arithmetic='exact' computes with the model's own code" in caplog.text


@pytest.mark.skipif(IS_INTERPRETED or torch.cuda.is_available(), reason="needs a machine without GPU")
def test_without_a_gpu_it_has_no_effect_and_says_so(small_checkpoint, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # which is not what is missing
    missing.cache_clear()
    expected = load(small_checkpoint)(prompt(1, 2)).logits
    for decode in ("device", "graph"):
        model = load(small_checkpoint, decode)
        assert f"decode='{decode}' has no effect: torch sees no GPU\n" in caplog.text
        assert torch.equal(model(prompt(1, 2)).logits, expected)
        tokens, _ = generate(model, prompt(), cache_implementation="static")
        assert tokens.shape[1] == 20 + NEW_TOKENS


def test_the_option_is_checked_and_written():
    config = OffloadConfig(decode="graph")
    assert OffloadConfig.from_dict(config.to_dict()) == config
    assert config.to_diff_dict()["decode"] == "graph"
    with pytest.raises(MoeOffloadError, match="decode='gpu' is not one of"):
        OffloadConfig(decode="gpu")
