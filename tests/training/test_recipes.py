"""What is trained and what is frozen, in plain and offloaded models alike."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import ConfigError, UnsupportedModelError, training
from transformers_moe_offload.training.recipes import experts
from zoo.build import build, zoo_model, zoo_names


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("recipe", ["router", "router+embeddings", "router+attention", "router+stem"])
def test_a_recipe_trains_the_same_in_the_offloaded_model_as_in_the_plain_one(checkpoint, recipe):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    offloaded = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload="auto")
    names = training.set_trainable(plain, recipe)
    assert names == training.set_trainable(offloaded, recipe)
    assert trained(plain) == trained(offloaded) == set(names)


def test_the_recipes_of_plain_models_nest(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trained_by = {recipe: set(training.set_trainable(model, recipe)) for recipe in training.RECIPES}
    assert all("mlp.gate" in name for name in trained_by["router"])
    assert all("mlp.experts" in name for name in trained_by["experts"])
    assert trained_by["router"] < trained_by["router+attention"] < trained_by["router+stem"] < trained_by["all"]
    assert trained_by["all"] == {name for name, _ in model.named_parameters()}
    assert trained_by["router+stem"] == trained_by["all"] - trained_by["experts"]
    assert "model.embed_tokens.weight" in trained_by["router+embeddings"]


@pytest.mark.parametrize("name", zoo_names())
def test_every_architecture_has_its_routers_found_and_only_they_get_gradients(name):
    """On meta: what is looked at are modules and shapes."""
    entry = zoo_model(name)
    with torch.device("meta"):
        model = entry.model_class._from_config(entry.config)
    model.requires_grad_(False)
    names = training.unfreeze_routers(model)
    assert names
    assert trained(model) == set(names)
    assert not set(names) & set(experts(model))
    assert not any("correction_bias" in name for name in names)


def test_unfreezing_routers_leaves_what_is_trained_already(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload="auto")
    training.set_trainable(model, "embeddings")
    training.unfreeze_routers(model)
    assert "model.embed_tokens.weight" in trained(model)
    assert any("gate" in name for name in trained(model))


@pytest.mark.parametrize("recipe", ["experts", "all", "router+experts"])
def test_offloaded_experts_are_not_trained_by_a_recipe(checkpoint, recipe):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload="auto")
    before = trained(model)
    with pytest.raises(ConfigError, match="unfreeze_experts"):
        training.set_trainable(model, recipe)
    assert trained(model) == before


def test_a_misspelt_recipe_is_an_error_that_knows_better(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload="auto")
    with pytest.raises(ConfigError, match="attention"):
        training.set_trainable(model, "router+atention")


def test_attention_in_low_bits_is_refused_with_what_to_do(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload={"dense": {"nbits": 4, "group_size": 16}})
    before = trained(model)
    with pytest.raises(ConfigError, match="without dense="):
        training.set_trainable(model, "router+attention")
    assert trained(model) == before
    assert training.set_trainable(model, "router")


def test_a_model_without_experts_has_no_routers():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        training.unfreeze_routers(LlamaForCausalLM(small))


def test_a_mixtral_and_a_qwen2_train_their_routers_and_nothing_else_moves():
    for name in ("mixtral", "qwen2_moe"):
        model = build(name).train()
        names = set(training.set_trainable(model, "router"))
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
        assert moved == names
