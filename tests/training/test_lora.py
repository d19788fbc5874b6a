"""LoRA on offloaded experts is PEFT's: its calls, its files, its arithmetic."""

import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_moe_offload import (
    ConfigError,
    HqqFormat,
    MoeOffloadError,
    OffloadConfig,
    UnsupportedModelError,
    training,
)
from zoo.build import build, inputs, output_tensor, save

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def pair(name, folder, *, arithmetic="exact", **options):
    """The plain model and the offloaded one, with the same weights."""
    plain = build(name)
    save(plain, folder, "fused")
    config = OffloadConfig(cache_budget="25%", arithmetic=arithmetic, **options)
    return plain, type(plain).from_pretrained(folder, moe_offload=config)


def adapted(model, *, seed=0, targets=EXPERTS, **options):
    """With LoRA on experts whose factors are all drawn from `seed`, so that it adds something."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets, **options)
    peft_model = get_peft_model(model, config)
    redraw(peft_model, seed)
    return peft_model


def redraw(model, seed):
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=random))


def logits(model, name):
    with torch.no_grad():
        return output_tensor(model(**inputs(name, model)))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
def test_logits_and_gradients_are_those_of_plain_peft(name, arithmetic, tmp_path):
    targets = ["experts.up_proj", "experts.down_proj"] if name == "nemotron_h" else EXPERTS
    models = [adapted(model, targets=targets) for model in pair(name, tmp_path, arithmetic=arithmetic)]
    grads, outputs = [], []
    for model in models:
        out = output_tensor(model(**inputs(name, model)))
        out.float().square().mean().backward()
        outputs.append(out.detach())
        grads.append({key: it.grad for key, it in model.named_parameters() if it.grad is not None})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert grads[0].keys() == grads[1].keys()
    assert sum("experts" in key for key in grads[0]) >= 4
    for key, expected in grads[0].items():
        error = (grads[1][key] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-3, key
        assert expected.norm() > 0


def test_exact_arithmetic_has_the_very_bits_of_plain_peft(tmp_path):
    plain, offloaded = pair("qwen3_moe", tmp_path)
    assert torch.equal(logits(adapted(plain), "qwen3_moe"), logits(adapted(offloaded), "qwen3_moe"))


@pytest.mark.parametrize("offloaded_first", [True, False])
def test_an_adapter_is_written_as_plain_peft_writes_it_and_read_by_the_other_model(tmp_path, offloaded_first):
    models = pair("qwen3_moe", tmp_path / "model")
    writer, reader = reversed(models) if offloaded_first else models
    writer = adapted(writer)
    writer.save_pretrained(tmp_path / "adapter")
    expected = logits(writer, "qwen3_moe")
    read = PeftModel.from_pretrained(reader, tmp_path / "adapter")
    assert torch.equal(logits(read, "qwen3_moe"), expected)
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight" in names
    read.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / it / "adapter_model.safetensors") for it in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_adapters_are_added_switched_disabled_and_deleted_as_on_a_plain_model(tmp_path):
    plain, offloaded = (adapted(model) for model in pair("qwen3_moe", tmp_path))
    steps = []
    for model in (plain, offloaded):
        seen = [logits(model, "qwen3_moe")]
        model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], target_parameters=EXPERTS))
        redraw(model, 1)
        seen.append(logits(model, "qwen3_moe"))
        model.set_adapter("other")
        seen.append(logits(model, "qwen3_moe"))
        with model.disable_adapter():
            seen.append(logits(model, "qwen3_moe"))
        model.base_model.set_adapter(["default", "other"])
        seen.append(logits(model, "qwen3_moe"))
        model.set_adapter("default")
        model.delete_adapter("other")
        seen.append(logits(model, "qwen3_moe"))
        steps.append((seen, {key: it.requires_grad for key, it in model.named_parameters() if "lora" in key}))
    for expected, got in zip(steps[0][0], steps[1][0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert steps[0][1] == steps[1][1]
    distinct = [steps[1][0][at] for at in (1, 2, 3, 4)]
    assert not any(torch.equal(a, b) for at, a in enumerate(distinct) for b in distinct[:at])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_names_of_linear_layers_that_experts_once_had_mean_the_experts(name, tmp_path):
    """PEFT turns `target_modules` of Mixtral and its relatives into `target_parameters`."""
    targets = ["w1", "w2", "w3"] if name == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    states = []
    for model in pair(name, tmp_path):
        peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", *targets]))
        redraw(peft_model, 0)
        states.append((peft_model.state_dict(), logits(peft_model, name)))
    lora = [{key for key in state if "lora" in key} for state, _ in states]
    assert lora[0] == lora[1]
    assert any("experts.base_layer.lora_A" in key for key in lora[0])
    assert torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize("targets", ["all-linear", r".*(q_proj|gate_proj|up_proj|down_proj)"])
def test_all_linear_and_patterns_reach_offloaded_experts_too(targets, tmp_path):
    plain, offloaded = (
        get_peft_model(model, LoraConfig(r=2, target_modules=targets)) for model in pair("qwen3_moe", tmp_path)
    )
    lora = [{key for key in model.state_dict() if "lora" in key} for model in (plain, offloaded)]
    assert lora[0] == lora[1]
    assert any("experts" in key for key in lora[0])


@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
def test_experts_in_low_bits_are_adapted_like_the_model_they_stand_for(arithmetic, tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    config = OffloadConfig(cache_budget="25%", arithmetic=arithmetic, experts=HqqFormat(nbits=4, group_size=16))
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, moe_offload=config)
    restored = AutoModelForCausalLM.from_pretrained(tmp_path, moe_offload=config)
    restored.moe_offload.restore()
    got, expected = (logits(adapted(model), "qwen3_moe") for model in (offloaded, restored))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_restored_model_keeps_its_adapters_and_merges_them_as_plain_peft_does(tmp_path):
    plain, offloaded = (adapted(model) for model in pair("qwen3_moe", tmp_path))
    with pytest.raises(ConfigError, match="restore"):
        offloaded.merge_adapter()
    with pytest.raises(ConfigError, match="restore"):
        offloaded.merge_and_unload()
    assert not any(getattr(module, "merged", False) for module in offloaded.modules())
    before = logits(offloaded, "qwen3_moe")
    offloaded.get_base_model().moe_offload.restore()
    offloaded.get_base_model().set_experts_implementation("eager")
    assert torch.equal(logits(offloaded, "qwen3_moe"), before)
    offloaded.merge_adapter()
    torch.testing.assert_close(logits(offloaded, "qwen3_moe"), before, rtol=1e-4, atol=1e-5)
    offloaded.unmerge_adapter()
    merged, expected = offloaded.merge_and_unload(), plain.merge_and_unload()
    for (key, parameter), other in zip(merged.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=key)


def test_adapters_on_attention_alone_are_merged_while_experts_are_offloaded(tmp_path):
    _, offloaded = pair("qwen3_moe", tmp_path)
    model = get_peft_model(offloaded, LoraConfig(r=2, target_modules=["q_proj"]))
    redraw(model, 0)
    before = logits(model, "qwen3_moe")
    torch.testing.assert_close(logits(model.merge_and_unload(), "qwen3_moe"), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name_and_changes_nothing(options, message, tmp_path):
    _, offloaded = pair("qwen3_moe", tmp_path)
    before = [name for name, _ in offloaded.named_modules()]
    with pytest.raises(ConfigError, match=message):
        get_peft_model(offloaded, LoraConfig(target_modules=["q_proj"], target_parameters=EXPERTS, **options))
    assert [name for name, _ in offloaded.named_modules()] == before
    assert not any("experts" in name for name, _ in offloaded.named_parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dbrx", {"target_parameters": ["mlp.w1"], "target_modules": []}),
        ("switch_transformers", {"target_modules": ["wi", "wo"]}),
    ],
)
def test_experts_of_a_layout_that_cannot_be_adapted_are_refused(name, options, tmp_path):
    _, offloaded = pair(name, tmp_path)
    with pytest.raises(UnsupportedModelError, match="restore"):
        get_peft_model(offloaded, LoraConfig(**options))


def test_the_mixin_of_transformers_takes_the_same_adapters(tmp_path):
    """`model.add_adapter` and `model.load_adapter`, without a PeftModel."""
    _, offloaded = pair("qwen3_moe", tmp_path / "model")
    adapted(offloaded).save_pretrained(tmp_path / "adapter")
    expected = logits(offloaded, "qwen3_moe")
    _, other = pair("qwen3_moe", tmp_path / "model")
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(other, "qwen3_moe"), expected)
    try:
        other.disable_adapters()
    except ValueError as error:  # Transformers 5.24 wants PEFT 0.22 for this
        pytest.skip(str(error))
    assert not torch.equal(logits(other, "qwen3_moe"), expected)


def test_generation_with_an_adapter_writes_what_the_plain_model_would(tmp_path):
    models = [adapted(model) for model in pair("qwen3_moe", tmp_path)]
    ids = torch.arange(5)[None]
    for options in ({}, {"num_beams": 3}):
        written = [model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **options) for model in models]
        assert torch.equal(*written)


def test_a_model_with_adapters_changes_dtype_with_them(tmp_path):
    models = [adapted(model) for model in pair("qwen3_moe", tmp_path)]
    for model in models:
        logits(model, "qwen3_moe")
        model.to(torch.bfloat16)
    expected, got = (logits(model, "qwen3_moe") for model in models)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_an_adapter_that_a_closed_model_refuses_leaves_no_parameters_behind(tmp_path):
    _, model = pair("qwen3_moe", tmp_path)
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    parameters = [name for name, _ in model.named_parameters()]
    model.moe_offload.close()
    with pytest.raises(MoeOffloadError, match="was closed"):
        adapted(model)
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before
    assert [name for name, _ in model.named_parameters()] == parameters


def test_without_peft_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'transformers-moe-offload\[adapters\]'"):
        training.lora_config(build("qwen3_moe"))
