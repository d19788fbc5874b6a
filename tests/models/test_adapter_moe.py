"""A mixture of adapters computes what PEFT computes with each of them, and what its routers make of several."""

import json

import pytest
import torch
from safetensors.torch import load_file

from models.mixtures import (
    FFN,
    TARGETS,
    TOKENS,
    dense_model,
    force,
    load,
    logits,
    mixture,
    saved,
    with_peft,
    write_adapter,
)
from programs import TORCH, run_program
from transformers_moe_offload import MoeOffloadError
from transformers_moe_offload.models.adapter_moe import AdapterMoeConfig, AdapterMoeForCausalLM
from transformers_moe_offload.models.adapter_moe.adapter_folders import AdapterFolder


@pytest.mark.parametrize("router_per", ["ffn", "linear", "model"])
def test_a_token_that_takes_one_adapter_gets_what_peft_gives_it(router_per, adapters):
    model = mixture(adapters, router_per=router_per, target_modules=TARGETS, rank=8, num_experts_per_tok=1)
    for number, folder in enumerate(adapters):
        force(model, number)
        torch.testing.assert_close(logits(model), logits(with_peft(folder)), rtol=0, atol=1e-6)


def test_adapters_that_all_add_alike_are_the_weighted_adapter_of_peft(tmp_path):
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    model = mixture(folders, router_per="linear", scoring="uniform", rank=4)
    peft = with_peft(folders[0])
    peft.load_adapter(folders[1], "b")
    peft.add_weighted_adapter(["default", "b"], [0.5, 0.5], "both", combination_type="cat")
    peft.set_adapter("both")
    torch.testing.assert_close(logits(model), logits(peft), rtol=0, atol=1e-5)


def test_a_feed_forward_block_with_a_router_is_the_weighted_sum_of_the_blocks_with_each_adapter(adapters):
    model = mixture(adapters, target_modules=TARGETS, rank=8, num_experts_per_tok=2)
    hidden = torch.randn(1, 5, 32)
    block = model.language_model.model.layers[1].mlp
    with torch.no_grad():
        _, weights, index = block.router(hidden[0])
        each = [with_peft(folder).base_model.model.model.layers[1].mlp(hidden)[0] for folder in adapters]
        expected = sum(torch.stack([each[index[t, k]][t] for t in range(5)]) * weights[:, k, None] for k in range(2))
        torch.testing.assert_close(block(hidden)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "arrow", "uniform"])
def test_weights_are_what_the_scoring_says(scoring, adapters):
    model = mixture(adapters, target_modules=TARGETS, rank=8, scoring=scoring, num_experts_per_tok=2, temperature=2.0)
    router = model.language_model.model.layers[0].mlp.router
    hidden = torch.randn(6, 32)
    scores, weights, index = router(hidden)
    if scoring == "uniform":
        assert weights.eq(1 / 3).all()
        assert index.tolist() == [[0, 1, 2]] * 6
        return
    expected = hidden @ router.weight.T / 2.0
    expected = expected.abs() if scoring == "arrow" else expected
    torch.testing.assert_close(scores, expected)
    best = expected.gather(-1, index)
    assert torch.equal(index, expected.topk(2).indices)
    torch.testing.assert_close(weights, best.sigmoid() if scoring == "sigmoid" else best.softmax(-1))


@pytest.mark.parametrize("router_per", ["ffn", "linear", "model"])
def test_what_is_saved_loads_with_nothing_missing_and_gives_the_same_logits(router_per, adapters, tmp_path):
    model = mixture(adapters, router_per=router_per, target_modules=TARGETS, rank=8)
    again, info = load(saved(model, tmp_path), output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(logits(again), logits(model))
    assert again.generate(TOKENS, max_new_tokens=3, num_beams=2).shape == (2, 10)


def test_each_adapter_of_a_saved_mixture_loads_alone_in_peft(adapters, tmp_path):
    saved(mixture(adapters, target_modules=TARGETS, rank=8), tmp_path)
    for folder in adapters:
        ours, theirs = (
            load_file(at / "adapter_model.safetensors") for at in (tmp_path / "adapters" / folder.name, folder)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.equal(logits(with_peft(tmp_path / "adapters" / folder.name)), logits(with_peft(folder)))


def test_adapters_that_were_trained_here_are_saved_as_they_are_now(adapters, tmp_path):
    model = mixture(adapters, target_modules=TARGETS, rank=8, num_experts_per_tok=1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    changed = model.language_model.model.layers[0].mlp.up_proj.experts.lora_B
    assert changed.grad.abs().sum() > 0
    with torch.no_grad():
        changed -= changed.grad
    saved(model, tmp_path)
    force(model, 0)
    torch.testing.assert_close(logits(with_peft(tmp_path / "adapters" / "wide")), logits(model), rtol=0, atol=1e-6)


def test_a_new_mixture_is_the_dense_model_until_it_is_trained(tmp_path):
    config = AdapterMoeConfig(text_config=dense_model().config.to_dict(), adapters=["a", "b", "c"], rank=4)
    model = AdapterMoeForCausalLM(config).eval()
    model.language_model.load_state_dict(dense_model().state_dict(), strict=False)
    torch.testing.assert_close(logits(model), logits(dense_model()), rtol=0, atol=1e-6)
    assert torch.equal(logits(load(saved(model, tmp_path))), logits(model))
    assert json.loads((tmp_path / "adapters" / "b" / "adapter_config.json").read_text())["r"] == 4


def test_gradient_checkpointing_gives_the_same_gradients(adapters):
    grads = []
    for checkpointing in (False, True):
        model = mixture(adapters, target_modules=TARGETS, rank=8).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_mixture_loads_without_the_package_where_remote_code_is_trusted(adapters, tmp_path):
    model = saved(mixture(adapters, target_modules=TARGETS, rank=8), tmp_path / "mixture")
    code = f"""
import sys
sys.modules["transformers_moe_offload"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(model)!r}, trust_remote_code=True)
print(model(input_ids=torch.tensor({TOKENS.tolist()})).logits.double().sum().item())
"""
    alone = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = run_program("python", "-c", code, variables=alone, imported=TORCH)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(logits(load(model)).double().sum().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_per": "layer"}, "router_per='layer' is not one of ffn, linear, model"),
        ({"scoring": "softmx"}, "scoring='softmx' is not one of"),
        ({"adapters": ["a", "a"]}, "has a name twice"),
        ({"adapters": ["../a"]}, "'../a' is no name for an adapter"),
        ({"adapters": ["a"], "num_experts_per_tok": 2}, "num_experts_per_tok=2, but the number of adapters is 1"),
        ({"temperature": 0.0}, "temperature=0.0 is not a positive number"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options, message):
    with pytest.raises(MoeOffloadError, match=message):
        AdapterMoeConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True, which cannot be mixed"),
        ({"bias": "lora_only"}, "bias='lora_only', which cannot be mixed"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which cannot be mixed"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', which cannot be mixed"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which cannot be mixed"),
        ({"rank": 16}, "has rank 16 at .* but the config says rank=8 at most"),
        ({"targets": ["k_proj"]}, "adds to model.layers.0.self_attn.k_proj, .* add 'k_proj' to the config's"),
    ],
)
def test_an_adapter_that_cannot_be_mixed_is_refused_by_what_it_has(options, message, tmp_path):
    folder = write_adapter(tmp_path / "odd", 1, **options)
    with pytest.raises(MoeOffloadError, match=message):
        mixture([folder], target_modules=FFN, rank=8, num_experts_per_tok=1)


def test_a_model_without_the_named_layers_is_refused(adapters):
    with pytest.raises(MoeOffloadError, match=r"no linear layer whose path ends with one of \['fc1'\]"):
        mixture(adapters, target_modules=["fc1"])


def test_a_folder_that_lost_an_adapter_is_refused(adapters, tmp_path):
    saved(mixture(adapters, target_modules=TARGETS, rank=8), tmp_path)
    (tmp_path / "adapters" / "narrow" / "adapter_model.safetensors").unlink()
    with pytest.raises(MoeOffloadError, match=r"narrow has no adapter_model\.safetensors"):
        load(tmp_path)


def test_a_config_that_is_no_object_is_refused_by_the_name_of_its_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(MoeOffloadError, match=r"is no PEFT adapter: adapter_config\.json holds a list"):
        AdapterFolder.open(tmp_path)
