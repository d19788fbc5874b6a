"""What an offloaded model saves is what the plain model saves."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_moe_offload import CheckpointError, HqqFormat, OffloadConfig
from zoo.build import build, save


def tensors_in(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "qwen3_moe",
        "mixtral",
        "gpt_oss",
        "ernie4_5_vl_moe",
        "dbrx",
        "switch_transformers",
        "diffusion_gemma",
        "longcat_flash",
    ],
)
def test_keys_and_values_are_the_plain_models(name, original_format, tmp_path):
    model_class = type(build(name))
    save(build(name), tmp_path / "source", "per-expert")
    plain = model_class.from_pretrained(tmp_path / "source")
    offloaded = model_class.from_pretrained(tmp_path / "source", moe_offload=OffloadConfig(cache_budget="40%"))
    plain.save_pretrained(tmp_path / "plain", save_original_format=original_format)
    offloaded.save_pretrained(tmp_path / "ours", save_original_format=original_format)
    expected, got = tensors_in(tmp_path / "plain"), tensors_in(tmp_path / "ours")
    assert set(got) == set(expected)
    assert all(torch.equal(got[key], tensor) and got[key].dtype == tensor.dtype for key, tensor in expected.items())


def test_the_saved_config_claims_no_format_of_ours(checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=True).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert "moe_offload" not in (tmp_path / "config.json").read_text()


def test_what_was_cast_is_saved_cast(checkpoint, plain, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    key = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(again.state_dict()[key], plain.state_dict()[key].bfloat16())


def test_saving_does_not_change_the_model(checkpoint, token_ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=True)
    with torch.no_grad():
        before = model(token_ids).logits
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert torch.equal(model(token_ids).logits, before)
    assert not [name for name in model.state_dict() if ".experts." in name]


def test_saving_an_adapter_reads_no_experts(own_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(own_checkpoint, moe_offload=True)
    try:
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:  # Transformers 5.24 wants PEFT 0.22 for this
        pytest.skip(str(error))
    shards = {file: load_file(file) for file in own_checkpoint.glob("*.safetensors")}
    for file, tensors in shards.items():
        if all(".experts." in name for name in tensors):
            file.unlink()
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}


@pytest.mark.parametrize("config", [OffloadConfig(), OffloadConfig(experts=HqqFormat(group_size=16))])
def test_a_model_is_not_saved_beside_an_adapter_that_would_be_loaded_on_it(checkpoint, tmp_path, config):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json of another checkpoint"):
        model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]
    (tmp_path / "adapter_config.json").unlink()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)


def test_a_quantized_model_is_not_saved_beside_plain_weights(checkpoint, tmp_path):
    config = OffloadConfig(experts=HqqFormat(group_size=16))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    (tmp_path / "model.safetensors").write_text("of another model")
    with pytest.raises(CheckpointError, match=r"has model\.safetensors of another checkpoint"):
        model.save_pretrained(tmp_path)
