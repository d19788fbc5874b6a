"""Merging into weights in low bits is refused, because an adapter would be lost in them."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from transformers_moe_offload import ConfigError, HqqFormat, OffloadConfig, restore
from transformers_moe_offload.training import save_merged
from zoo.build import build, inputs, output_tensor

REFUSAL = r"is in low bits .* restore\(\) the model first, or write a merged checkpoint with training.save_merged"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    config = OffloadConfig(cache_budget="50%", dense=HqqFormat(group_size=16))
    return AutoModelForCausalLM.from_pretrained(folder, moe_offload=config)


def logits(model):
    with torch.no_grad():
        return output_tensor(model(**inputs("qwen3_moe", model)))


def adapted(model, config):
    peft_model = get_peft_model(model, config)
    random = torch.Generator().manual_seed(0)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return peft_model


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"]),
        LoHaConfig(r=2, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=["LoRA", "LoHa", "IA3"],
)
def test_peft_s_merging_is_refused_and_leaves_the_adapter_at_work(config, method, is_safe, model):
    peft_model = adapted(model, config)
    before = logits(peft_model)
    with pytest.raises(ConfigError, match=REFUSAL):
        getattr(peft_model, method)(safe_merge=is_safe)
    assert torch.equal(logits(peft_model), before)


def test_lora_names_the_layer_and_merges_no_other_before(model):
    peft_model = adapted(model, LoraConfig(r=2, target_modules=["lm_head", "o_proj"]))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.o_proj is in low bits"):
        peft_model.merge_adapter()
    assert not any(getattr(module, "merged", False) for module in peft_model.modules())


def test_a_restored_model_is_merged_and_so_is_a_checkpoint_of_its_own(model, tmp_path):
    peft_model = adapted(model, LoraConfig(r=2, target_modules=["q_proj"]))
    before = logits(peft_model)
    save_merged(peft_model, tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before, rtol=1e-3, atol=1e-4)
    restore(peft_model)
    torch.testing.assert_close(logits(peft_model.merge_and_unload()), before, rtol=1e-3, atol=1e-4)


def add_to_data(weight):
    weight.data += 1


def add_to_detached(weight):
    weight.detach().add_(1)


def set_data(weight):
    weight.data = weight.data.clone() + 1


def set_a_row(weight):
    weight[0] = 1


def add_to_a_row(weight):
    weight.t()[0].add_(1)


def initialise(weight):
    nn.init.zeros_(weight)


def multiply_into(weight):
    torch.mul(weight, 2, out=weight)


@pytest.mark.parametrize(
    "write", [add_to_data, add_to_detached, set_data, set_a_row, add_to_a_row, initialise, multiply_into]
)
def test_writing_to_a_weight_in_low_bits_is_refused(write, model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.clone()
    with torch.no_grad(), pytest.raises(ConfigError, match=REFUSAL):
        write(weight)
    assert torch.equal(weight, before)


def test_what_is_computed_from_a_weight_in_low_bits_is_an_ordinary_tensor(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight * 2) is type(weight.clone()) is type(weight.float().double()) is torch.Tensor
    doubled = weight.clone()
    doubled += weight
    assert torch.equal(doubled, weight + weight)
