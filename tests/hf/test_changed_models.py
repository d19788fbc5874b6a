"""A model is changed after it was loaded: what cannot be followed is an error, and nothing is silently lost."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from transformers_moe_offload import CheckpointError, HqqFormat, MoeOffloadError, UnsupportedModelError, training
from transformers_moe_offload.hf.model.experts_module import offloaded
from zoo.build import build, save


def loaded(checkpoint, **options):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, moe_offload={"cache_budget": "60%", "arithmetic": "exact"} | options
    )


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


WRITES = {
    "in place": lambda experts: experts.down_proj.zero_(),
    "into a view": lambda experts: experts.down_proj[3].zero_(),
    "into a view of a view": lambda experts: experts.down_proj[3][:2].mul_(2),
    "into a part": lambda experts: next(iter(experts.down_proj.chunk(2))).fill_(1),
    "by index": lambda experts: experts.down_proj.__setitem__(0, 0.0),
    "by an operator": lambda experts: experts.down_proj.__iadd__(1),
    "into data": lambda experts: experts.down_proj.data.__setitem__(3, 0.0),
    "as data": lambda experts: setattr(experts.down_proj, "data", torch.zeros_like(experts.down_proj, device="cpu")),
    "as a result": lambda experts: torch.zeros(1, device="meta", out=experts.down_proj),
    "by a function": lambda experts: nn.init.zeros_(experts.down_proj),
    "as a parameter": lambda experts: setattr(experts, "down_proj", nn.Parameter(torch.zeros(2))),
    "to be trained": lambda experts: experts.get_parameter("down_proj").requires_grad_(True),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_to_offloaded_experts_is_an_error_and_not_lost(checkpoint, token_ids, write):
    model = loaded(checkpoint)
    before = logits(model, token_ids)
    for changed in (model, deepcopy(model)):
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="offloaded and constant"):
            write(changed.model.layers[0].mlp.experts)
    assert torch.equal(logits(model, token_ids), before)


def test_the_parameters_of_offloaded_experts_can_be_looked_at(checkpoint):
    experts, plain = loaded(checkpoint).model.layers[0].mlp.experts, build("qwen3_moe").model.layers[0].mlp.experts
    down = experts.get_parameter("down_proj")
    assert (down.shape, down.dtype, down.device.type) == (plain.down_proj.shape, plain.down_proj.dtype, "meta")
    assert down[0].shape == plain.down_proj[0].shape
    assert not down.requires_grad_(False).requires_grad
    own = torch.empty_like(down, device="cpu")
    own.zero_()  # memory of its own
    assert type(own) is torch.Tensor


def reordered(layers):
    layers[1], layers[2] = layers[2], layers[1]
    return layers


CHANGES = {
    "reordered": reordered,
    "duplicated": lambda layers: [*layers[:2], deepcopy(layers[1]), *layers[2:]],
    "repeated": lambda layers: [layers[0], layers[0], *layers[2:]],
    "dropped": lambda layers: layers[:2],
    "dropped and copied": lambda layers: [layers[0], *layers[2:], deepcopy(layers[-1])],
}


def change(model, how):
    layers = how(list(model.model.layers))
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    return model


@pytest.mark.parametrize("options", [{}, {"experts": HqqFormat(nbits=8, group_size=16)}], ids=["plain", "low bits"])
@pytest.mark.parametrize("how", CHANGES.values(), ids=CHANGES)
def test_layers_that_are_elsewhere_are_computed_but_not_saved_under_names_of_others(
    checkpoint, token_ids, tmp_path, how, options
):
    model = change(loaded(checkpoint, **options), how)
    expected = logits(model, token_ids)
    if not options:
        plain = change(AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager"), how)
        assert torch.equal(expected, logits(plain, token_ids))
    for refused in (
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: model.moe_offload.restore(),
        lambda: model.moe_offload.state_dict(),
        lambda: training.unfreeze_experts(model, {0: [1]}),
    ):
        with pytest.raises(UnsupportedModelError, match="load the model without moe_offload"):
            refused()
    assert not (tmp_path / "saved").exists()
    assert torch.equal(logits(model, token_ids), expected)


def test_a_layer_of_another_model_is_not_saved_under_the_name_of_the_one_it_replaced(checkpoint, tmp_path):
    model, other = loaded(checkpoint), loaded(checkpoint)
    model.model.layers[1] = other.model.layers[2]
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts is not the module"):
        model.save_pretrained(tmp_path / "saved")


def test_a_block_that_was_replaced_by_a_plain_one_is_named(checkpoint, tmp_path):
    model = loaded(checkpoint)
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts is not"):
        model.save_pretrained(tmp_path / "saved")


def test_a_model_with_fewer_layers_is_cast_and_copied_with_a_prefetcher(checkpoint, token_ids):
    model = change(loaded(checkpoint, prefetch={"predictor": "next_router"}), lambda layers: layers[:2])
    expected = logits(model, token_ids)
    assert torch.equal(logits(deepcopy(model), token_ids), expected)
    assert torch.equal(logits(model.double().float(), token_ids), expected)


def test_compiled_code_does_not_take_the_experts_of_the_layer_that_is_there_now(checkpoint, token_ids):
    model = loaded(checkpoint)
    experts = offloaded(model.model.layers[1].mlp.experts)
    change(model, reordered)
    with pytest.raises(UnsupportedModelError, match=r"without torch\.compile"):
        experts.compute(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_a_part_of_an_offloaded_model_is_not_saved_without_its_experts(checkpoint, tmp_path):
    model = loaded(checkpoint)
    headed = AutoModelForSequenceClassification.from_config(model.config)
    headed.model = model.model
    for part in (model.model, headed):
        with pytest.raises(UnsupportedModelError, match=r"without the experts of (model\.)?layers\.0"):
            part.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    model.moe_offload.restore()
    model.model.save_pretrained(tmp_path / "part")


def test_a_part_that_outlives_its_model_says_what_is_missing(checkpoint, token_ids):
    part = loaded(checkpoint).model
    with pytest.raises(MoeOffloadError, match="keep a reference to all of it"):
        part.double()(token_ids)


def test_experts_that_were_trained_in_full_are_loaded_only_where_there_are_such(tmp_path):
    save(build("qwen3_moe"), tmp_path, "per-expert")
    trained, other = loaded(tmp_path), loaded(tmp_path)
    training.unfreeze_experts(trained, {0: [3]})
    with pytest.raises(CheckpointError, match=r"training\.unfreeze_experts\(model, \{0: \[3\]\}\)"):
        other.load_state_dict(trained.state_dict())
