"""Whole steps that are captured and replayed give the bits of those that are not.

Tests marked `gpu` run on a GPU where there is one, and interpreted by `test_interpreted.py`.
"""

import copy
import gc
import importlib.util
import logging
import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from interpreted import DEVICE, IS_INTERPRETED
from transformers_moe_offload.hf.cuda_graphs.step import COMPILED_STEPS
from transformers_moe_offload.hf.upstream import kv_cache_argument, kv_cache_of_output
from transformers_moe_offload.routing import record_routing, set_routing

from ..decoding import NEW_TOKENS, SMALL, Pieces, generate, load, prompt, save, static

gpu = pytest.mark.gpu
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def eager(small_checkpoint):
    """Tokens and logits of steps that are not captured."""
    model = load(small_checkpoint, "device", "50%", device=DEVICE)
    return generate(model, prompt(), cache_implementation="static")


def step_of(model):
    return model.get_compiled_call(None)


@gpu
@pytest.mark.parametrize("budget", ["13%", "100%"])
def test_replayed_steps_give_the_same_bits_at_every_cache_size(small_checkpoint, eager, budget):
    model = load(small_checkpoint, "graph", budget, device=DEVICE)
    tokens, logits = generate(model, prompt(), **static())
    assert torch.equal(tokens, eager[0])
    assert torch.equal(logits, eager[1])
    step = step_of(model)
    assert (step.num_captured, step.num_replayed) == (1, NEW_TOKENS - 2)  # the prompt and one step were not
    asked = load(small_checkpoint, "device", budget, device=DEVICE)
    generate(asked, prompt(), cache_implementation="static")
    assert model.moe_offload.stats().asked == asked.moe_offload.stats().asked


@gpu
def test_steps_whose_routers_prefer_residents_are_captured_and_without_that_captured_anew(small_checkpoint, eager):
    model = load(small_checkpoint, "graph", "50%", device=DEVICE)
    step, longer = step_of(model), static(max_new_tokens=12, min_new_tokens=12)
    generate(model, prompt(), **longer)
    own = model.moe_offload.stats().misses
    model.moe_offload.clear()
    model.moe_offload.reset_stats()
    with set_routing(model, "cache_aware", strength=1.0):
        generate(model, prompt(), **longer)
        assert (step.num_captured, step.num_replayed) == (2, 20)
    assert model.moe_offload.stats().misses < own
    tokens, logits = generate(model, prompt(), **longer)
    assert torch.equal(tokens[:, : eager[0].shape[1]], eager[0])
    torch.testing.assert_close(logits[:NEW_TOKENS], eager[1])  # over a longer KV cache
    assert step.num_captured == 3


@gpu
def test_another_generation_of_the_same_shape_goes_on_with_what_was_captured(small_checkpoint, eager):
    model = load(small_checkpoint, "graph", device=DEVICE)
    for seed in (1, 0):
        tokens, logits = generate(model, prompt(seed=seed), **static())
        gc.collect()
    assert torch.equal(tokens, eager[0])
    assert torch.equal(logits, eager[1])
    step = step_of(model)
    assert (step.num_captured, step.num_replayed) == (1, 2 * NEW_TOKENS - 3)
    generate(model, prompt(2), **static(max_new_tokens=4))
    assert step.num_captured == 2


@gpu
def test_a_cache_that_is_kept_keeps_what_is_in_it(small_checkpoint):
    model = load(small_checkpoint, "graph", device=DEVICE)
    kept = model.generate(prompt().to(DEVICE), **static(max_new_tokens=4, return_dict_in_generate=True, pad_token_id=0))
    cache = kv_cache_of_output(kept)
    before = [layer.keys.clone() for layer in cache.layers]
    generate(model, prompt(seed=1), **static(max_new_tokens=4))
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


@gpu
def test_a_sliding_window_that_fills_up_meanwhile_is_captured_twice(tmp_path):
    save("gpt_oss", tmp_path)
    seen = []
    for decode, options in (("device", {"cache_implementation": "static"}), ("graph", static())):
        model = load(tmp_path, decode, "50%", device=DEVICE)
        seen.append(generate(model, prompt(1, 4), max_new_tokens=9, **options))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    step = step_of(model)
    assert (step.num_captured, step.num_replayed) == (2, 6)


class _Between(LogitsProcessor):
    """Does something after some steps."""

    def __init__(self, deeds):
        self._deeds = dict(deeds)
        self._number = 0

    def __call__(self, input_ids, scores):
        self._number += 1
        if self._number in self._deeds:
            self._deeds[self._number]()
        return scores


@gpu
def test_resizing_and_replacing_experts_between_replays_changes_nothing(small_checkpoint, eager):
    model = load(small_checkpoint, "graph", "13%", device=DEVICE)
    deeds = {3: lambda: model.moe_offload.resize("100%"), 4: lambda: model.moe_offload.resize("13%")}
    tokens, logits = generate(model, prompt(), **static(logits_processor=LogitsProcessorList([_Between(deeds)])))
    assert torch.equal(tokens, eager[0])
    assert torch.equal(logits, eager[1])
    assert step_of(model).num_captured == 1


@gpu
def test_threads_that_share_a_model_get_the_right_tokens(small_checkpoint, eager):
    model = load(small_checkpoint, "graph", device=DEVICE)
    found = []
    threads = [threading.Thread(target=lambda: found.append(generate(model, prompt(), **static()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(tokens, eager[0]) and torch.equal(logits, eager[1]) for tokens, logits in found)


@gpu
def test_a_model_that_has_changed_is_captured_again(small_checkpoint):
    model = load(small_checkpoint, "graph", device=DEVICE)
    generate(model, prompt(), **static())
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # where it is read by graphs, too
    tokens, _ = generate(model, prompt(), **static())
    assert step_of(model).num_captured == 1
    model.model.norm.weight = torch.nn.Parameter(2 * model.model.norm.weight)
    again, _ = generate(model, prompt(), **static())
    assert step_of(model).num_captured == 2
    expected = load(small_checkpoint, "device", device=DEVICE)
    with torch.no_grad():
        expected.lm_head.weight.mul_(-1)
    assert torch.equal(tokens, generate(expected, prompt(), cache_implementation="static")[0])
    assert torch.equal(again, tokens)  # twice as large, and in the same order


@gpu
def test_copies_capture_for_themselves_and_restored_models_not_at_all(small_checkpoint, eager):
    model = load(small_checkpoint, "graph", device=DEVICE)
    generate(model, prompt(), **static())
    twin = copy.deepcopy(model)
    assert step_of(twin) is not step_of(model)
    assert torch.equal(generate(twin, prompt(), **static())[1], eager[1])
    assert step_of(twin).num_captured == 1
    plain = model.moe_offload.restore()
    assert "get_compiled_call" not in vars(plain)


@gpu
def test_dense_modules_that_were_compiled_in_place_are_captured_as_they_are(small_checkpoint, eager):
    model = load(small_checkpoint, "graph", device=DEVICE)
    for layer in model.model.layers:
        layer.self_attn.compile(backend="eager")
    tokens, logits = generate(model, prompt(), **static())
    assert torch.equal(tokens, eager[0])
    torch.testing.assert_close(logits, eager[1], rtol=1e-4, atol=1e-5)  # Transformers' attention differs a little
    assert step_of(model).num_captured == 1


@gpu
@pytest.mark.parametrize("name", ["gpt_oss"] if IS_INTERPRETED else sorted(SMALL))
def test_steps_are_compiled_around_the_experts_and_then_captured_where_generate_is_told_to(tmp_path, name):
    torch.compiler.reset()  # numbers that differed in another model would be variable, and waited for, in this one
    save(name, tmp_path)
    options = {"max_new_tokens": 9, "cache_implementation": "static"}
    expected = generate(load(tmp_path, "device", device=DEVICE), prompt(1, 4), **options)
    model = load(tmp_path, "graph", device=DEVICE)
    pieces = Pieces()
    options = static(backend=pieces, fullgraph=True, max_new_tokens=9)
    tokens, logits = generate(model, prompt(1, 4), **options)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-5)
    step = model.get_compiled_call(options["compile_config"])
    num_phases = 2 if name == "gpt_oss" else 1  # its sliding window fills up
    assert (step.num_captured, step.num_replayed) == (num_phases, 8 - num_phases * COMPILED_STEPS)
    assert 0 < len(pieces.sizes) <= num_phases * COMPILED_STEPS
    assert pieces.num_runs >= num_phases * (COMPILED_STEPS + 1)  # captured ones among them
    assert step is not step_of(model)
    assert step_of(model).num_captured == 0


@gpu
def test_a_step_that_waits_for_the_device_is_computed_as_ever_and_the_log_says_why(
    small_checkpoint, eager, caplog, monkeypatch
):
    model = load(small_checkpoint, "graph", device=DEVICE)
    forward = model.model.norm.forward

    def waits(hidden):
        return forward(hidden) if hidden.sum().item() != 0.125 else hidden

    monkeypatch.setattr(model.model.norm, "forward", waits)
    tokens, logits = generate(model, prompt(), **static())
    assert torch.equal(tokens, eager[0])
    assert torch.equal(logits, eager[1])
    assert step_of(model).num_captured == 0
    assert caplog.text.count("steps are not captured: a CUDA graph cannot capture Qwen3MoeForCausalLM") == 1


@gpu
def test_what_only_python_sees_has_steps_computed_as_ever(small_checkpoint, eager, caplog):
    from peft import LoraConfig, get_peft_model

    caplog.set_level(logging.INFO)
    model = load(small_checkpoint, "graph", device=DEVICE)
    with record_routing(model):
        assert torch.equal(generate(model, prompt(), **static())[1], eager[1])
    with model.moe_offload.trace() as trace:
        generate(model, prompt(), **static())
    assert sum(map(sum, trace.counts().values())) > 0
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(generate(adapted, prompt(), **static())[1], eager[1])
    assert step_of(model).num_captured == 0
    for reason in ("has a hook, ForwardContext.", "the model is being traced", "has an adapter"):
        assert caplog.text.count(reason) == 1


@gpu
def test_a_dynamic_cache_and_gradients_are_left_alone(small_checkpoint, caplog):
    model = load(small_checkpoint, "graph", device=DEVICE)
    step = step_of(model)
    ids = prompt(1, 2).to(DEVICE)
    with torch.no_grad():
        past = kv_cache_argument(model, model(ids, use_cache=True))
        for _ in range(3):
            step(input_ids=ids[:, :1], use_cache=True, **past)
    (cache,) = past.values()
    assert cache.get_seq_length() == 5
    assert step.num_captured == 0
    assert "the KV cache is a DynamicCache" in caplog.text
