"""Experts follow what is done to a model's parameters without `nn.Module._apply` hearing of it."""

import pytest
import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from transformers_moe_offload import HqqFormat, OffloadConfig
from zoo.build import build, inputs, output_tensor


def cast_one_by_one(model, dtype):
    """What `model.to(dtype)` does, past it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A Qwen3-MoE in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    build("qwen3_moe", torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder, **options):
    config = OffloadConfig(cache_budget="40%", **{"arithmetic": "exact"} | options)
    return AutoModelForCausalLM.from_pretrained(folder, moe_offload=config)


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


def logits(model, token_ids):
    with torch.no_grad():
        return model(input_ids=token_ids).logits


def test_a_model_prepared_by_peft_has_the_logits_of_the_plain_one_prepared(half, token_ids):
    plain, ours = (prepare_model_for_kbit_training(model) for model in (plain_model(half), load(half)))
    expected = logits(plain, token_ids)
    assert expected.dtype == torch.float32
    assert torch.equal(logits(ours, token_ids), expected)
    fast = prepare_model_for_kbit_training(load(half, arithmetic="fast"))
    # Experts that are cast when they are used are not computed by one call, and are added up in another order.
    torch.testing.assert_close(logits(fast, token_ids), logits(load(half, arithmetic="fast").float(), token_ids))
    torch.testing.assert_close(logits(fast, token_ids), expected)


@pytest.mark.parametrize("name", ["gpt_oss", "dbrx", "longcat_flash", "switch_transformers", "jetmoe"])
@pytest.mark.parametrize(("stored", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_layouts_of_all_kinds_follow_bit_for_bit(name, stored, dtype, tmp_path):
    model = build(name, stored)
    model.save_pretrained(tmp_path)
    plain = cast_one_by_one(type(model).from_pretrained(tmp_path, dtype=stored, experts_implementation="eager"), dtype)
    given = inputs(name, plain)
    config = OffloadConfig(cache_budget="40%", arithmetic="exact")
    ours = cast_one_by_one(type(model).from_pretrained(tmp_path, dtype=stored, moe_offload=config), dtype)
    with torch.no_grad():
        assert torch.equal(output_tensor(ours(**given)), output_tensor(plain(**given)))


@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
def test_gradients_follow_as_well(arithmetic, half, token_ids):
    plain, ours = (
        cast_one_by_one(model, torch.float32) for model in (plain_model(half), load(half, arithmetic=arithmetic))
    )
    for model in (plain, ours):
        model(input_ids=token_ids, labels=token_ids).loss.backward()
    expected = dict(plain.named_parameters())
    expected, (rtol, atol) = dict(plain.named_parameters()), (0, 0) if arithmetic == "exact" else (1e-4, 1e-6)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("arithmetic", ["exact", "fast", "int8"])
def test_experts_in_low_bits_follow_in_every_arithmetic(arithmetic, half, token_ids):
    options = {"experts": HqqFormat(group_size=16), "arithmetic": arithmetic}
    ours = cast_one_by_one(load(half, **options), torch.float32)
    expected = logits(load(half, **options).float(), token_ids)
    torch.testing.assert_close(logits(ours, token_ids), expected, rtol=0, atol=2e-2)


def test_experts_go_back_when_the_parameters_do(half, token_ids):
    model = load(half)
    before = logits(model, token_ids)
    assert logits(cast_one_by_one(model, torch.float32), token_ids).dtype == torch.float32
    assert torch.equal(logits(cast_one_by_one(model, torch.bfloat16), token_ids), before)


def test_what_is_saved_afterwards_has_the_values_that_it_had(half, token_ids, tmp_path):
    model = prepare_model_for_kbit_training(load(half))
    expected = logits(model, token_ids)
    model.save_pretrained(tmp_path)
    again = plain_model(tmp_path).float()
    assert torch.equal(logits(again, token_ids), expected)
