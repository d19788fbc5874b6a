"""What is streamed from a plain checkpoint is what loading the model and quantizing it would have given."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from transformers_moe_offload import ConfigError, HqqFormat, OffloadConfig
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.hf.prebuilt.layout import prebuilt_config
from transformers_moe_offload.hf.prebuilt.quantize import recipe_of
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hf.prebuilt.source import Quantization, contents
from transformers_moe_offload.hf.prebuilt.writer import Prebuilt, write_prebuilt
from transformers_moe_offload.hub.fetch import fetch
from transformers_moe_offload.tensor_files.index import read_index
from transformers_moe_offload.tensor_files.writer import as_json
from zoo.build import build, inputs, output_tensor, save

KINDS = {
    "qwen3_moe": "experts stored one by one",
    "mixtral": "the same under other names",
    "gpt_oss": "transposed, with biases",
    "ernie4_5_vl_moe": "experts of text and images in one list, buffers in float32",
    "deepseek_v3": "shared experts, a bias in float32",
    "nemotron_h": "no gate, state space layers",
    "diffusion_gemma": "an encoder and a decoder that share weights",
    "switch_transformers": "experts are modules, three names for one embedding",
}
FORMAT = HqqFormat(nbits=4, group_size=16)
LOCAL = {"revision": "main", "token": None, "local_files_only": True}


def quantization(folder: Path, config: OffloadConfig) -> Quantization:
    source = meta_model(str(folder), **LOCAL)
    return Quantization.of(source.model, config, source.dtype, source.opener)


def quantize(source: Path, folder: Path, config: OffloadConfig) -> Sizes:
    fetched = fetch(str(source), None, LOCAL)
    planned = quantization(source, config)
    plain = AutoConfig.from_pretrained(source).to_dict()
    layers, dense = contents(planned, fetched)
    content = Prebuilt(layers, dense, {"config.json": as_json(prebuilt_config(plain, config.recipe()))})
    write_prebuilt(folder, content, {}, workers=1, advance=lambda nbytes: None)
    return Sizes.of(planned)


@pytest.mark.parametrize("name", KINDS)
def test_it_loads_as_the_model_that_was_quantized_while_it_was_loaded(name, tmp_path):
    plain = build(name, torch.bfloat16)
    save(plain, tmp_path / "plain", "per-expert")
    quantize(tmp_path / "plain", tmp_path / "prebuilt", OffloadConfig(experts=FORMAT))
    expected = type(plain).from_pretrained(tmp_path / "plain", moe_offload=OffloadConfig(experts=FORMAT))
    model, info = type(plain).from_pretrained(tmp_path / "prebuilt", output_loading_info=True)
    assert not any((info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]))
    weights = model.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.state_dict().items())
    with torch.no_grad():
        outputs = [output_tensor(loaded(**inputs(name, loaded))) for loaded in (model, expected)]
    assert torch.equal(*outputs)


@pytest.fixture
def plain(tmp_path) -> Path:
    build("qwen3_moe").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_dense_layers_are_stored_packed_and_everything_else_as_it_was(plain, tmp_path):
    quantize(plain, tmp_path / "prebuilt", OffloadConfig(experts=FORMAT, dense=FORMAT))
    stored = read_index(sorted((tmp_path / "prebuilt").glob("*.safetensors")))
    of_attention = {name for name in stored if "layers.0.self_attn.q_proj" in name}
    parts = ("codes", "scale", "scale_range", "zero", "zero_range")
    assert of_attention == {f"model.layers.0.self_attn.q_proj.weight_{part}" for part in parts}
    assert stored["model.embed_tokens.weight"].dtype == "float32"
    assert stored["model.layers.1.mlp.gate.weight"].dtype == "float32"


def test_sizes_are_those_of_the_files(plain, tmp_path):
    sizes = quantize(plain, tmp_path / "prebuilt", OffloadConfig(experts=FORMAT, dense=FORMAT))
    stored = read_index(sorted((tmp_path / "prebuilt").glob("*.safetensors")))
    dense_bytes = sum(t.nbytes for name, t in stored.items() if not name.endswith((".records", ".checksums")))
    assert sizes.dense_bytes == dense_bytes
    assert sizes.plain_bytes == sum(t.nbytes for t in read_index(plain.glob("*.safetensors")).values())
    assert sizes.bits_per_expert_weight == pytest.approx(FORMAT.bits_per_weight, rel=0.01)
    model = type(build("qwen3_moe")).from_pretrained(tmp_path / "prebuilt")
    assert sizes.smallest_budget == model.moe_offload.plan.smallest_budget
    assert sizes.cache_bytes == model.moe_offload.plan.expert_bytes


# What the recipe says.


def recipe(folder: Path) -> dict:
    fetched = fetch(str(folder), None, LOCAL)
    return recipe_of(fetched.name, fetched.revision, fetched.weights, "float32", OffloadConfig(experts=FORMAT))


def test_a_recipe_tells_a_fine_tune_from_the_original_and_not_where_either_is(plain, tmp_path):
    original = recipe(plain)
    assert str(tmp_path) not in as_json(original)
    assert recipe(plain) == original
    build("qwen3_moe", seed=1).save_pretrained(plain)
    tuned = recipe(plain)
    assert tuned != original
    assert tuned["source"]["name"] == original["source"]["name"]


# Wrong input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"experts": HqqFormat(group_size=128)},
            r"layers\.\d\.mlp\.experts: group_size=128 .* sizes that fit are \[16, 32\]",
        ),
        ({"dense": HqqFormat(group_size=128)}, "4-bit, groups of 128 fits none of the model's attention and dense"),
    ],
)
def test_a_group_size_that_does_not_fit_is_refused_with_the_matrix_and_the_sizes_that_do(plain, options, message):
    with pytest.raises(ConfigError, match=message):
        quantization(plain, OffloadConfig(**options))


def test_a_checkpoint_that_lacks_a_dense_weight_is_refused_by_its_name(tmp_path):
    model = build("qwen3_moe")
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.0.self_attn.k_proj" not in name}
    model.save_pretrained(tmp_path / "plain", state_dict=weights)
    with pytest.raises(CheckpointError, match=r"holds nothing for model\.layers\.0\.self_attn\.k_proj\.weight"):
        quantize(tmp_path / "plain", tmp_path / "prebuilt", OffloadConfig(experts=FORMAT))
    assert not (tmp_path / "prebuilt").exists()


def test_a_weight_of_another_shape_is_refused_with_both(tmp_path):
    model = build("qwen3_moe")
    weights = model.state_dict() | {"model.norm.weight": torch.ones(7)}
    model.save_pretrained(tmp_path / "plain", state_dict=weights)
    with pytest.raises(CheckpointError, match=r"holds \[7\] for model\.norm\.weight, but the model expects \[64\]"):
        quantize(tmp_path / "plain", tmp_path / "prebuilt", OffloadConfig(experts=FORMAT))
