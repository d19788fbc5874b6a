"""The output embedding in low bits: what is packed, what is computed, saved and restored, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from transformers_moe_offload import ConfigError, HqqFormat, OffloadConfig, quantize_checkpoint, restore, training
from transformers_moe_offload.hf.packed_linear import HqqLinear

from .conftest import TINY_MOE

FORMAT = HqqFormat(nbits=8, group_size=16)
FOUR = HqqFormat(nbits=4, group_size=16)
ALL = {"experts": FOUR, "dense": FOUR, "lm_head": FORMAT}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, moe_offload=OffloadConfig(**options))


def packed(model):
    return {path for path, module in model.named_modules() if isinstance(module, HqqLinear)}


@torch.no_grad()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


# What is computed.


def test_the_head_alone_is_packed_and_beside_dense_layers_in_a_format_of_its_own(checkpoint):
    model = load(checkpoint, lm_head=FORMAT)
    assert packed(model) == {"lm_head"}
    both = load(checkpoint, dense=FOUR, lm_head=FORMAT)
    assert both.lm_head.packing.nbits == 8
    assert both.model.layers[0].self_attn.q_proj.packing.nbits == 4
    assert type(both.model.embed_tokens) is nn.Embedding


def test_logits_are_those_of_the_decoded_matrix(checkpoint, plain, token_ids, expected):
    model = load(checkpoint, lm_head=FORMAT)
    got = logits(model, token_ids)
    with torch.no_grad():
        hidden = plain.model(input_ids=token_ids).last_hidden_state
    torch.testing.assert_close(got, hidden @ model.lm_head.weight.t(), atol=1e-4, rtol=1e-4)
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("arithmetic", ["fast", "exact", "int8"])
def test_tokens_and_logits_do_not_depend_on_where_experts_are(arithmetic, checkpoint, token_ids):
    found = []
    for placement in ({"mmap": False, "cache_budget": "20%"}, {"mmap": False, "cache_budget": "100%"}, {"mmap": True}):
        model = load(checkpoint, arithmetic=arithmetic, **ALL, **placement)
        tokens = model.generate(token_ids, max_new_tokens=8, do_sample=False)
        found.append((tokens, logits(model, tokens)))
    assert all(torch.equal(one, other) for pair in found for one, other in zip(pair, found[0], strict=True))


def test_its_inputs_are_rounded_to_8_bits_with_int8_arithmetic_only(checkpoint):
    assert load(checkpoint, lm_head=FORMAT, arithmetic="int8").lm_head.activations == "int8"
    assert load(checkpoint, lm_head=FORMAT).lm_head.activations == "exact"


def test_restoring_makes_a_plain_head_of_the_decoded_matrix(checkpoint, token_ids, tmp_path):
    model = load(checkpoint, lm_head=FORMAT)
    before, decoded = logits(model, token_ids), model.lm_head.weight.clone()
    plain = restore(model)
    assert type(plain.lm_head) is nn.Linear
    assert torch.equal(plain.lm_head.weight, decoded)
    torch.testing.assert_close(logits(plain, token_ids), before, atol=1e-4, rtol=1e-4)
    plain.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, decoded)


# What is saved.


def test_a_saved_model_has_the_same_logits_and_is_saved_again_as_the_same_bytes(checkpoint, token_ids, tmp_path):
    model = load(checkpoint, **ALL)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.moe_offload.config.lm_head == FORMAT
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    again.save_pretrained(tmp_path / "again")
    assert [(one.name, one.read_bytes()) for one in sorted((tmp_path / "saved").iterdir())] == [
        (one.name, one.read_bytes()) for one in sorted((tmp_path / "again").iterdir())
    ]


@pytest.mark.parametrize("options", [{"lm_head": FORMAT}, ALL], ids=["head", "all"])
def test_a_checkpoint_that_was_quantized_is_the_model_that_is_quantized_while_it_is_loaded(
    options, checkpoint, token_ids, tmp_path
):
    made = quantize_checkpoint(checkpoint, tmp_path / "made", advance=lambda nbytes: None, **options)
    model, expected = AutoModelForCausalLM.from_pretrained(made.folder), load(checkpoint, **options)
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert made.sizes.dense_bytes == sum(tensor.nbytes for tensor in state.values())
    assert "| output embedding | 8-bit, groups of 16 | 9.031 |" in (made.folder / "README.md").read_text()


def test_a_recipe_without_it_is_what_it_was_and_of_one_with_it_the_format_cannot_be_changed(checkpoint, tmp_path):
    assert OffloadConfig(dense=FOUR).recipe().keys() == {"quant_method", "version", "experts", "dense"}
    load(checkpoint, lm_head=FORMAT).save_pretrained(tmp_path)
    recipe = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert HqqFormat(**recipe["lm_head"]) == FORMAT
    load(tmp_path, lm_head=replace(FORMAT, optimize=False))
    with pytest.raises(ConfigError, match=r"lm_head=4-bit.* was asked for, but .* quantized with lm_head=8-bit"):
        load(tmp_path, lm_head=FOUR)


def test_a_class_without_a_head_loads_the_checkpoint_and_says_that_it_leaves_the_head(checkpoint, token_ids, tmp_path):
    model = load(checkpoint, **ALL)
    model.save_pretrained(tmp_path / "saved")
    base, report = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert {name.partition(".")[0] for name in report["unexpected_keys"]} == {"lm_head"}
    with torch.no_grad():
        hidden = base(input_ids=token_ids).last_hidden_state
        assert torch.equal(model.lm_head(hidden), logits(model, token_ids))
    base.save_pretrained(tmp_path / "base")
    assert "lm_head" not in (tmp_path / "base" / "config.json").read_text()


@pytest.mark.parametrize("num_tokens", [120, 140])
@pytest.mark.parametrize("options", [{"lm_head": FORMAT}, ALL], ids=["head", "all"])
def test_a_vocabulary_that_is_resized_has_a_plain_head_and_is_saved_with_it(
    num_tokens, options, checkpoint, token_ids, tmp_path
):
    model = load(checkpoint, **options)
    before = model.lm_head.weight[:100].clone()
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    assert torch.equal(model.lm_head.weight[:100], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), token_ids), logits(model, token_ids))


# What is refused.


def quantized(folder, tmp_path, format):
    return quantize_checkpoint(folder, tmp_path / "out", lm_head=format, advance=lambda nbytes: None)


def loaded(folder, _, format):
    return load(folder, lm_head=format)


@pytest.mark.parametrize("way", [loaded, quantized])
def test_a_head_that_is_tied_to_the_input_embedding_is_refused(way, tmp_path):
    message = "lm_head of Qwen3MoeForCausalLM shares its matrix with the input embedding (tie_word_embeddings)"
    with pytest.raises(ConfigError, match=re.escape(message)):
        way(TINY_MOE, tmp_path, HqqFormat(nbits=8, group_size=64))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", [loaded, quantized])
def test_a_group_size_that_does_not_divide_its_inputs_is_refused_with_both(way, checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="group_size=128 does not divide the 64 inputs of lm_head"):
        way(checkpoint, tmp_path, HqqFormat(nbits=8, group_size=128))
    assert not list(tmp_path.iterdir())


def test_a_class_without_a_head_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="Qwen3MoeModel has no output embedding; leave lm_head out"):
        AutoModel.from_pretrained(checkpoint, moe_offload={"lm_head": {"nbits": 8, "group_size": 16}})


def test_dense_layers_that_no_format_fits_are_refused_while_loading_too(checkpoint):
    with pytest.raises(ConfigError, match="4-bit, groups of 128 fits none of the model's attention and dense MLP"):
        load(checkpoint, dense=HqqFormat(group_size=128))


# Training.


def test_an_adapter_on_the_head_is_trained_and_not_merged(checkpoint, token_ids):
    adapted = get_peft_model(load(checkpoint, lm_head=FORMAT), LoraConfig(r=2, target_modules=["lm_head"]))
    adapted(input_ids=token_ids, labels=token_ids).loss.backward()
    (gradient,) = [one.grad for name, one in adapted.named_parameters() if "lm_head.lora_B" in name]
    assert gradient.abs().sum() > 0
    with pytest.raises(ConfigError, match=r"lm_head is in low bits .* nothing can be merged into it"):
        adapted.merge_adapter()


def test_training_the_whole_head_is_refused_before_anything_is_changed(checkpoint):
    model = load(checkpoint, lm_head=FORMAT)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ConfigError, match=r"lm_head is in low bits .* cannot be trained"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    with pytest.raises(ConfigError, match="cannot be trained"):
        model.lm_head.requires_grad_(True)
    model.requires_grad_(True)


def test_attention_is_trained_beside_a_head_in_low_bits_and_the_whole_stem_is_not(checkpoint):
    model = load(checkpoint, lm_head=FORMAT)
    assert training.set_trainable(model, "router+attention")
    with pytest.raises(ConfigError, match=r"lm_head and 0 more are in low bits .* without dense= and lm_head="):
        training.set_trainable(model, "stem")
