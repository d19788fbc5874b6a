"""Adapters are merged as PEFT merges them; kinds that are merged otherwise are refused by name."""

import json
import time

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from builder.made import dense_model, save_dense
from transformers_moe_offload.builder.recipe import Origin
from transformers_moe_offload.builder.sources import open_source
from transformers_moe_offload.errors import CheckpointError, RecipeError
from transformers_moe_offload.models.adapter_moe.adapter_folders import expect_patterns, rank_of

LINEARS = ["up_proj", "down_proj", "q_proj"]
CASES = {
    "plain": {},
    "rank and alpha by pattern": {
        "rank_pattern": {"layers.1.mlp.up_proj": 5, "down_proj": 3}, "alpha_pattern": {r".*\.2\.mlp\.down_proj": 11},
    },
    "scaled by the root of the rank": {"use_rslora": True},
    "fan_in_fan_out, which is not for linear layers": {"fan_in_fan_out": True},
    "whole modules beside": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embeddings too": {"target_modules": [*LINEARS, "embed_tokens"]},
    "some layers": {"layers_to_transform": [0, 3]},
}  # fmt: skip


def trained(base, folder, **options):
    """An adapter whose matrices are all random, in a folder; and the model merged by PEFT."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS, **options}
    model = peft.get_peft_model(dense_model("llama"), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("base") / "dense")


def opened(base, folder):
    dense = open_source(Origin(model=str(base)))
    return open_source(Origin(adapter=str(folder)), base=dense)


@pytest.mark.filterwarnings("ignore")  # PEFT's, about options that are tried here on purpose
@pytest.mark.parametrize("case", CASES)
def test_a_merged_tensor_is_the_one_that_peft_makes(base, tmp_path, case):
    merged = trained(base, tmp_path, **CASES[case]).state_dict()
    source = opened(base, tmp_path)
    plain = load_file(base / "model.safetensors")
    changed = 0
    for name, spec in source.tensors.items():
        torch.testing.assert_close(source.read(name), merged[name], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(source.read_rows(name, 1, 4), merged[name][1:4], atol=1e-6, rtol=1e-6)
        assert spec.shape == tuple(merged[name].shape)
        changed += not torch.equal(plain[name], merged[name])
    assert changed >= 6
    assert source.name == f"dense+{tmp_path.name}"
    assert [ancestor.name for ancestor in source.ancestors] == ["dense", tmp_path.name]


def test_a_merge_is_in_float32_whatever_the_base_is_stored_in(base, tmp_path):
    half = save_dense(tmp_path / "half")
    state = {name: value.bfloat16() for name, value in load_file(half / "model.safetensors").items()}
    save_file(state, half / "model.safetensors")
    trained(base, tmp_path / "lora")
    source = opened(half, tmp_path / "lora")
    name = "model.layers.1.mlp.up_proj.weight"
    assert source.read(name).dtype == torch.float32
    assert source.tensors[name].dtype == "float32"
    assert source.tensors["model.layers.1.mlp.gate_proj.weight"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"a_kind_of_the_future": {"x": 1}}, "a_kind_of_the_future"),
        ({"peft_type": "IA3"}, "of kind 'IA3'"),
        ({"r": 5}, "its config says rank 5"),
    ],
)
def test_what_is_not_merged_as_lora_is_refused_by_name(base, tmp_path, changes, match):
    trained(base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises((RecipeError, CheckpointError), match=match):
        opened(base, tmp_path)


def test_an_adapter_of_another_model_is_an_error(tmp_path):
    wide, shallow = save_dense(tmp_path / "wide", hidden_size=64), save_dense(tmp_path / "shallow", num_hidden_layers=2)
    trained(None, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="belongs to another model"):
        opened(wide, tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"changes model.layers.*, which shallow does not have"):
        opened(shallow, tmp_path / "lora")


def test_half_of_a_pair_is_an_error(base, tmp_path):
    trained(base, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    state.pop(next(name for name in state if "lora_B" in name))
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="without the second matrix"):
        opened(base, tmp_path)


def test_a_pickled_or_missing_adapter_is_an_error(base, tmp_path):
    trained(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        opened(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not the config of a LoRA adapter"):
        opened(base, tmp_path)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|a)*b", "[", "(?P<x>", ".*.*.*.*x", "(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)", "(?=a)", "a" * 10_000],
)
def test_a_pattern_that_could_take_for_ever_or_is_none_is_refused_by_its_name(pattern, base, tmp_path):
    trained(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {pattern: 2}}))
    start = time.process_time()
    with pytest.raises(RecipeError, match="rank_pattern has the pattern") as refused:
        opened(base, tmp_path)
    assert time.process_time() - start < 2
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "up_proj", "layers.1.mlp.up_proj", r"model\.layers\.0\.mlp\.up_proj", r"layers\.\d+\.mlp\.up_proj",
        r".*\.(up|down)_proj", r"layers\.[0-1]\..*_proj", "^model.layers.0.mlp.up_proj", "(?:up|gate)_proj", "p_proj",
        "self_attn", r"layers\.1[0-9]?\.mlp.up_proj", "up_proj$",
    ],
)  # fmt: skip
def test_patterns_that_are_read_match_what_they_match_in_peft(pattern):
    expect_patterns("rank_pattern", {pattern: 2})
    for path in ("model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj", "up_proj", "model.layers.1.mlp.cup_proj",
                 "model.layers.0.self_attn.q_proj", "modelXlayersX0XmlpXup_proj"):  # fmt: skip
        rank = rank_of({"r": 1, "rank_pattern": {pattern: 2}}, path)
        assert rank == (2 if get_pattern_key([pattern], path) == pattern else 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0}, {"r": "8"}, {"r": 10**400}, {"lora_alpha": None}, {"rank_pattern": ["q"]}, {"peft_type": ["LORA"]},
        {"rank_pattern": {"q_proj": 0}}, {"alpha_pattern": {"q_proj": "x"}}, {"init_lora_weights": {"a": 1}},
        {"bias": ["none"] * 10_000}, {"x" * 10_000: 1}, {"base_model_name_or_path": {"a": [1] * 1000}, "r": -1},
    ],
)  # fmt: skip
def test_a_config_with_values_that_cannot_be_is_an_error_of_ours(changes, base, tmp_path):
    trained(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((RecipeError, CheckpointError)) as refused:
        opened(base, tmp_path)
    assert len(str(refused.value)) < 700
