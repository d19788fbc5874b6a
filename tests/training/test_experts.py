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
    routing,
    training,
)
from transformers_moe_offload.tracing import TraceError
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


TOP = 2


def counted_by_hand(plain, windows):
    """How many tokens chose each expert, by layer, from the indices that the plain model's routers return."""
    counts = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, path=path: counts.setdefault(path.replace(".gate", ".experts"), []).extend(
                output[2].flatten().tolist()  # scores, weights and indices (T, K)
            )
        )
        for path, module in plain.named_modules()
        if path.endswith(".mlp.gate")
    ]
    with torch.no_grad():
        for window in windows:
            plain(input_ids=window)
    for hook in hooks:
        hook.remove()
    num_experts = plain.config.num_experts
    return {path: [chosen.count(expert) for expert in range(num_experts)] for path, chosen in counts.items()}


def most_chosen(counts):
    return {
        layer: sorted(sorted(range(len(uses)), key=lambda expert: (-uses[expert], expert))[:TOP])
        for layer, uses in counts.items()
    }


def chosen_of(names):
    chosen = {}
    for name in names:
        layer, _, rest = name.partition(".own_experts.")
        chosen.setdefault(layer, set()).add(int(rest.partition(".")[0]))
    return {layer: sorted(experts) for layer, experts in chosen.items()}


@pytest.fixture
def windows():
    return torch.randint(0, 96, (3, 2, 32), generator=torch.Generator().manual_seed(1)).unbind()


def test_the_experts_that_most_tokens_of_a_recording_chose_are_trained(windows, tmp_path):
    plain, offloaded = pair("qwen3_moe", tmp_path)
    counts = counted_by_hand(plain, windows)
    expected = most_chosen(counts)
    assert all(min(uses) > 0 for uses in counts.values()), "by visits, all experts are equal"
    assert any(experts != [*range(TOP)] for experts in expected.values()), "those with the lowest numbers"
    with routing.record_routing(offloaded) as recorder, torch.no_grad():
        for window in windows:
            offloaded(input_ids=window)
    assert recorder.trace.token_counts() == counts
    assert chosen_of(training.unfreeze_experts(offloaded, top=TOP, trace=recorder.trace)) == expected


@pytest.mark.parametrize("by", [lambda trace: trace, lambda trace: trace.token_counts()], ids=["trace", "counts"])
def test_a_trace_of_single_tokens_tells_the_same(by, windows, tmp_path):
    plain, offloaded = pair("qwen3_moe", tmp_path)
    tokens = [token.view(1, 1) for window in windows for token in window.flatten()]
    expected = most_chosen(counted_by_hand(plain, tokens))
    with offloaded.moe_offload.trace() as trace, torch.no_grad():
        for token in tokens:
            offloaded(input_ids=token)
    assert chosen_of(training.unfreeze_experts(offloaded, top=TOP, trace=by(trace))) == expected


def test_a_trace_of_many_tokens_at_once_does_not_tell_which_experts_are_used_most(windows, tmp_path):
    _, offloaded = pair("qwen3_moe", tmp_path)
    with offloaded.moe_offload.trace() as trace, torch.no_grad():
        for window in windows:
            offloaded(input_ids=window)
    with pytest.raises(TraceError, match=r"its steps have 64 tokens, .*record_routing"):
        training.unfreeze_experts(offloaded, top=TOP, trace=trace)
    assert not any("own_experts" in name for name, _ in offloaded.named_parameters())


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
