"""Gradients flow through offloaded experts, bit for bit as through the plain model's."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from zoo.build import build, inputs, output_tensor, save


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "dbrx", "jetmoe", "switch_transformers", "zaya"])
@pytest.mark.parametrize("budget", ["15%", "100%"])
def test_every_dense_parameter_gets_the_plain_models_gradient(name, budget, tmp_path):
    plain = build(name)
    save(plain, tmp_path, "fused")
    config = OffloadConfig(cache_budget=budget, arithmetic="exact")
    offloaded = type(plain).from_pretrained(tmp_path, moe_offload=config)
    for model in (plain, offloaded):
        output_tensor(model(**inputs(name, model))).square().mean().backward()
    expected = {key: parameter.grad for key, parameter in plain.named_parameters()}
    checked = 0
    for key, parameter in offloaded.named_parameters():
        if expected[key] is not None:
            assert torch.equal(parameter.grad, expected[key]), key
            checked += 1
    assert checked > 10


def test_gradient_checkpointing_gives_the_same(checkpoint, token_ids):
    grads = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=OffloadConfig(cache_budget="25%")).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_fast_arithmetic_has_the_gradients_of_exact_arithmetic_up_to_rounding(checkpoint, token_ids):
    grads = []
    for arithmetic in ("exact", "fast"):
        config = OffloadConfig(cache_budget="25%", arithmetic=arithmetic)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for exact, fast in zip(*grads, strict=True):
        torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-6)
