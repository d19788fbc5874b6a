"""Gradients flow through offloaded experts, bit for bit as through the plain model's."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import HqqFormat, OffloadConfig
from zoo.build import build, inputs, output_tensor, save


@pytest.mark.parametrize(
    "name", ["qwen2_moe", "gpt_oss", "dbrx", "jetmoe", "switch_transformers", "zaya", "muse_spark"]
)
@pytest.mark.parametrize("budget", ["15%", "100%"])
def test_every_dense_parameter_gets_the_plain_models_gradient(name, budget, tmp_path):
    """Also where shared experts add to the same gradients (qwen2_moe) or a norm is inside the experts (muse_spark)."""
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


def gradients(model, token_ids, *, autocast=False):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=token_ids, labels=token_ids).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if "experts" not in name}


@pytest.mark.parametrize("autocast", [False, True])
def test_low_bit_experts_have_the_gradients_of_the_model_they_stand_for(checkpoint, token_ids, autocast):
    config = OffloadConfig(cache_budget="25%", arithmetic="exact", experts=HqqFormat(nbits=4, group_size=16))
    got = gradients(AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config), token_ids, autocast=autocast)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    plain.moe_offload.restore()
    plain.set_experts_implementation("eager")
    expected = gradients(plain, token_ids, autocast=autocast)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulated_gradients_are_the_plain_models(checkpoint, plain, token_ids, dtype):
    grads = []
    for options in ({"experts_implementation": "eager"}, {"moe_offload": OffloadConfig(arithmetic="exact")}):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **options)
        for part in token_ids.split(1):
            grad = gradients(model, part)
        grads.append(grad)
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_both_kinds_of_gradient_checkpointing_give_the_same(checkpoint, token_ids, use_reentrant, arithmetic):
    config = OffloadConfig(cache_budget="25%", arithmetic=arithmetic)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config).train()
    expected = gradients(model, token_ids)
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = gradients(model, token_ids)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_backward_pass_brings_experts_in_before_it_comes_to_them(checkpoint, token_ids):
    config = OffloadConfig(cache_budget="50%", mmap=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    loss = model(input_ids=token_ids, labels=token_ids).loss
    model.moe_offload.reset_stats()
    loss.backward()
    assert model.moe_offload.stats().prefetch_used > 0
