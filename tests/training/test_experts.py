"""Chosen experts are trained like any parameters, and come back where they belong."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_moe_offload import (
    CapacityError,
    CheckpointError,
    ConfigError,
    HqqFormat,
    OffloadConfig,
    UnsupportedModelError,
    training,
)
from zoo.build import build, inputs, output_tensor, save

CHOSEN = {0: [1, 3], 2: [0]}


def pair(name, folder, *, arithmetic="exact", layout="per-expert"):
    plain = build(name)
    save(plain, folder, layout)
    config = OffloadConfig(cache_budget="60%", arithmetic=arithmetic)
    return plain, type(plain).from_pretrained(folder, moe_offload=config)


def steps(model, name, parameters, number=3):
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for seed in range(number):
        loss = output_tensor(model(**inputs(name, model, seed=seed))).float().square().mean()
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def train_rows_only(plain, chosen):
    """The same in the plain model: whole stacks are parameters, and the gradients of other experts are dropped."""
    plain.requires_grad_(False)
    stacks = []
    sparse = [module for module in plain.modules() if "gate_up_proj" in module._parameters]
    for layer, experts in chosen.items():
        for stack in sparse[layer]._parameters.values():
            mask = torch.zeros(len(stack), *[1] * (stack.dim() - 1))
            mask[experts] = 1
            stack.requires_grad_(True)
            stack.register_hook(lambda grad, mask=mask: grad * mask)
            stacks.append(stack)
    return stacks


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
def test_chosen_experts_learn_what_they_would_learn_in_the_plain_model(name, arithmetic, tmp_path):
    plain, offloaded = pair(name, tmp_path, arithmetic=arithmetic)
    offloaded.requires_grad_(False)
    names = training.unfreeze_experts(offloaded, CHOSEN)
    trained = [p for p in offloaded.parameters() if p.requires_grad]
    assert len(names) == len(trained)
    stacks = train_rows_only(plain, CHOSEN)
    losses = steps(offloaded, name, trained)
    expected = steps(plain, name, stacks)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert losses[-1] != losses[0]
    for path, module in offloaded.named_modules():
        if path.endswith("own_experts"):
            stack_owner = plain.get_submodule(path.removesuffix(".own_experts"))
            for expert, fields in module.named_children():
                for field, parameter in fields.named_parameters():
                    expected_row = stack_owner._parameters[field][int(expert)]
                    torch.testing.assert_close(parameter, expected_row, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_trained_experts_are_written_among_the_others_under_their_plain_names(name, tmp_path):
    plain, offloaded = pair(name, tmp_path / "model")
    training.set_trainable(offloaded, "router")
    names = training.unfreeze_experts(offloaded, CHOSEN)
    steps(offloaded, name, [offloaded.get_parameter(it) for it in names])
    expected = output_tensor(offloaded(**inputs(name, offloaded))).detach()
    offloaded.save_pretrained(tmp_path / "trained")
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "trained" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 9  # gate, up and down of three experts
    again = type(plain).from_pretrained(tmp_path / "trained", experts_implementation="eager")
    assert torch.equal(output_tensor(again(**inputs(name, again))), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("original", [True, False])
def test_what_was_saved_is_loaded_again_by_load_state_dict(name, original, tmp_path):
    """Trainer does that when it goes on from a checkpoint: routers and experts included, whatever files call them."""
    _, trained = pair(name, tmp_path / "model")
    training.set_trainable(trained, "router")
    own = training.unfreeze_experts(trained, CHOSEN)
    steps(trained, name, [p for p in trained.parameters() if p.requires_grad])
    trained.save_pretrained(tmp_path / "trained", save_original_format=original)
    _, fresh = pair(name, tmp_path / "model")
    training.unfreeze_experts(fresh, CHOSEN)
    result = fresh.load_state_dict(load_file(tmp_path / "trained" / "model.safetensors"), strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for key, parameter in trained.named_parameters():
        assert torch.equal(fresh.get_parameter(key), parameter), key
    assert all(any(key == name for name, _ in fresh.named_parameters()) for key in own)


@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx", "switch_transformers"])
def test_weights_of_another_model_are_refused(name, tmp_path):
    """However experts are laid out: in one stack, one after another in a matrix, each in a module of its own."""
    _, offloaded = pair(name, tmp_path / "model")
    other = build(name, seed=1)
    before = {key: it.clone() for key, it in offloaded.state_dict().items()}
    with pytest.raises(CheckpointError, match="frozen"):
        offloaded.load_state_dict(other.state_dict(), strict=False)
    assert all(torch.equal(it, before[key]) for key, it in offloaded.state_dict().items())


@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx", "switch_transformers"])
def test_the_weights_that_a_model_was_loaded_with_are_taken_again(name, tmp_path):
    plain, offloaded = pair(name, tmp_path / "model")
    assert str(offloaded.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"


def test_experts_in_low_bits_are_not_silently_kept_in_place_of_those_that_are_loaded(checkpoint):
    config = OffloadConfig(experts=HqqFormat(nbits=4, group_size=32))
    offloaded = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    with pytest.raises(CheckpointError, match="are in low bits and constant; leave them out"):
        offloaded.load_state_dict(plain)
    dense = {name: tensor for name, tensor in plain.items() if ".experts." not in name}
    assert str(offloaded.load_state_dict(dense)) == "<All keys matched successfully>"


def test_the_most_used_experts_of_a_trace_are_chosen(tmp_path):
    _, offloaded = pair("qwen3_moe", tmp_path)
    with offloaded.moe_offload.trace() as trace:
        offloaded(**inputs("qwen3_moe", offloaded))
    names = training.unfreeze_experts(offloaded, top=1, trace=trace)
    for layer, uses in trace.counts().items():
        chosen = {int(name.split(".own_experts.")[1].split(".")[0]) for name in names if name.startswith(f"{layer}.")}
        assert chosen == {max(range(len(uses)), key=lambda e: uses[e])}


def test_own_experts_survive_restore_copying_and_a_change_of_dtype(tmp_path):
    _, offloaded = pair("qwen3_moe", tmp_path)
    names = training.unfreeze_experts(offloaded, CHOSEN)
    steps(offloaded, "qwen3_moe", [offloaded.get_parameter(it) for it in names])
    expected = output_tensor(offloaded(**inputs("qwen3_moe", offloaded))).detach()
    twin = copy.deepcopy(offloaded)
    assert torch.equal(output_tensor(twin(**inputs("qwen3_moe", twin))), expected)
    twin.to(torch.bfloat16)
    assert twin.get_parameter(names[0]).dtype == torch.bfloat16
    assert output_tensor(twin(**inputs("qwen3_moe", twin))).dtype == torch.bfloat16
    offloaded.moe_offload.restore()
    offloaded.set_experts_implementation("eager")
    assert torch.equal(output_tensor(offloaded(**inputs("qwen3_moe", offloaded))), expected)
    assert not any("own_experts" in name for name, _ in offloaded.named_parameters())


def test_a_budget_that_is_too_small_for_the_chosen_experts_names_one_that_works(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=OffloadConfig(cache_budget="10%"))
    everything = {layer.name: range(layer.num_experts) for layer in model.moe_offload.layers}
    with pytest.raises(CapacityError) as caught:
        training.unfreeze_experts(model, everything)
    assert not any("own_experts" in name for name, _ in model.named_parameters())
    config = OffloadConfig(cache_budget=caught.value.smallest_budget)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    training.unfreeze_experts(model, everything)
    assert model.moe_offload.plan.budget_bytes == model.moe_offload.plan.smallest_budget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "top=n"),
        ({"top": 1}, "trace"),
        ({"experts": {9: [0]}}, "no sparse layer 9"),
        ({"experts": {"model.layers.0.mlp": [0]}}, "the first is"),
        ({"experts": {0: [8]}}, "0 to 7"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(checkpoint, arguments, message):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload="auto")
    with pytest.raises(ConfigError, match=message):
        training.unfreeze_experts(model, **arguments)


def test_experts_in_low_bits_are_constant_and_say_so(checkpoint):
    config = OffloadConfig(experts=HqqFormat(nbits=4, group_size=16))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    with pytest.raises(ConfigError, match="quantized and constant"):
        training.unfreeze_experts(model, {0: [0]})


def test_experts_that_are_modules_of_their_own_are_refused(tmp_path):
    _, model = pair("switch_transformers", tmp_path)
    with pytest.raises(UnsupportedModelError, match="restore"):
        training.unfreeze_experts(model, {0: [0]})
