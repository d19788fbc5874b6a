"""Checkpoints that another method has quantized: experts stay as they are stored, and results are that method's."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoQuantizationConfig

from transformers_moe_offload import CheckpointError, ConfigError, HqqFormat, OffloadConfig, UnsupportedModelError
from zoo.build import build, inputs, output_tensor, save

from .made import FP8, KINDS, as_fp8, opened_fp8, opened_mxfp4


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folder with the checkpoint of a kind, and the model as Transformers loads it, dequantized."""
    made = {}

    def stored(name, dtype=torch.bfloat16):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            model = build(name, dtype)
            save(model, folder, "per-expert")
            quantize, config = KINDS[name]
            quantize(folder)
            plain = type(model).from_pretrained(
                folder, dtype=dtype, quantization_config=deepcopy(config), experts_implementation="eager"
            )
            made[name, dtype] = folder, plain
        return made[name, dtype]

    return stored


@pytest.fixture
def own(tmp_path):
    """An FP8 checkpoint of one's own, to change: its file and its tensors."""
    model = build("qwen3_moe", torch.bfloat16)
    save(model, tmp_path, "per-expert")
    as_fp8(tmp_path)
    return tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")


def load(folder, plain=None, **options):
    options = {"cache_budget": "30%", "arithmetic": "exact"} | options
    dtype = plain.dtype if plain is not None else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, moe_offload=OffloadConfig(**options))


@torch.no_grad()
def forward(name, model):
    return output_tensor(model(**inputs(name, model)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_dequantized_model_wherever_experts_are(name, dtype, stored):
    folder, plain = stored(name, dtype)
    expected = forward(name, plain)
    placements = ({"mmap": False, "cache_budget": "20%"}, {"mmap": False, "cache_budget": "100%"}, {"mmap": True})
    for placement in placements:
        model = load(folder, plain, **placement)
        assert torch.equal(forward(name, model), expected)
        assert torch.equal(forward(name, model), expected)
        assert model.moe_offload.stats().asked > 0


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_nothing_is_reported_missing_or_unexpected(name, stored):
    folder, plain = stored(name)
    model, report = type(plain).from_pretrained(folder, dtype=plain.dtype, moe_offload=True, output_loading_info=True)
    assert type(model) is type(plain)
    assert not any(report.values())


def test_fast_arithmetic_is_as_close_to_the_opened_weights_as_the_plain_model(stored):
    folder, plain = stored("gpt_oss")
    got = forward("gpt_oss", load(folder, plain, arithmetic="fast")).double()
    exact = forward("gpt_oss", deepcopy(plain).double())
    assert (got - exact).abs().mean() <= 1.5 * (forward("gpt_oss", plain) - exact).abs().mean()


def test_a_slot_holds_an_expert_in_fp8_with_its_scales(stored):
    folder, plain = stored("qwen3_moe")
    model = load(folder, plain)
    weights, blocks = 3 * 64 * 96, 3 * 64 * 96 // 16**2
    assert model.moe_offload.plan.pools[0].need.slot_bytes - (weights + 4 * blocks) < 6 * 64
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    opened = opened_fp8(tensors[name], tensors[f"{name}_scale_inv"])
    restored = model.moe_offload.restore().get_parameter("model.layers.1.mlp.experts.down_proj")[5]
    assert torch.equal(restored, opened.to(torch.bfloat16))


def test_a_slot_holds_an_expert_in_mxfp4_with_its_exponents(stored):
    folder, plain = stored("gpt_oss")
    model = load(folder, plain)
    weights, biases = 3 * 64 * 96, 2 * 96 + 64
    assert model.moe_offload.plan.pools[0].need.slot_bytes - (weights * 17 // 32 + 2 * biases) < 6 * 64
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.gate_up_proj"
    opened = opened_mxfp4(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).transpose(1, 2)
    restored = model.moe_offload.restore().get_parameter(name)
    assert torch.equal(restored, opened.to(torch.bfloat16))


@pytest.mark.parametrize("scales", ["uint8", "float8_e8m0fnu"])
def test_scales_may_be_powers_of_two(scales, tmp_path):
    model = build("qwen3_moe", torch.bfloat16)
    save(model, tmp_path, "per-expert")
    as_fp8(tmp_path, scales, block=(1, 32), scale_fmt="ue8m0")
    plain = type(model).from_pretrained(
        tmp_path, dtype=model.dtype, quantization_config=FP8, experts_implementation="eager"
    )
    assert torch.equal(forward("qwen3_moe", load(tmp_path)), forward("qwen3_moe", plain))


def test_layers_that_were_not_quantized_are_loaded_beside_those_that_were(own, stored):
    file, tensors = own
    plain = stored("qwen3_moe")[1]
    for name in [name for name in tensors if ".layers.2.mlp.experts." in name and name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = opened_fp8(tensors[weight], tensors.pop(name)).to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    model = load(file.parent)
    assert torch.equal(forward("qwen3_moe", model), forward("qwen3_moe", plain))
    assert [pool.layers for pool in model.moe_offload.plan.pools] == [(0, 1, 3), (2,)]


def test_a_cast_model_is_the_plain_one_cast(stored):
    folder, plain = stored("qwen3_moe")
    model = load(folder, plain).float()
    assert torch.equal(forward("qwen3_moe", model), forward("qwen3_moe", deepcopy(plain).float()))


def test_gradients_are_those_of_the_dequantized_model(stored):
    gradients = []
    folder, plain = stored("gpt_oss", torch.float32)
    for model in (deepcopy(plain), load(folder, plain)):
        embedded = model.get_input_embeddings()(inputs("gpt_oss", model)["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v4", "gpt_oss"])
def test_what_is_saved_is_the_plain_dequantized_model(name, stored, tmp_path):
    folder, plain = stored(name)
    load(folder, plain).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    saved = type(plain).from_pretrained(tmp_path, dtype=plain.dtype, experts_implementation="eager")
    assert torch.equal(forward(name, saved), forward(name, plain))


def test_experts_and_dense_layers_can_be_quantized_anew_while_they_are_loaded(stored, tmp_path):
    folder, plain = stored("qwen3_moe")
    plain.save_pretrained(tmp_path, save_original_format=False)
    formats = {"experts": HqqFormat(nbits=4, group_size=16), "dense": HqqFormat(nbits=8, group_size=16)}
    expected = forward("qwen3_moe", load(tmp_path, plain, **formats))
    assert not torch.equal(expected, forward("qwen3_moe", plain))
    assert torch.equal(forward("qwen3_moe", load(folder, plain, **formats)), expected)


def test_experts_as_stored_beside_dense_layers_in_a_format_of_ours_are_saved_opened(stored, tmp_path):
    folder, plain = stored("qwen3_moe")
    model = load(folder, plain, dense=HqqFormat(nbits=8, group_size=16))
    model.save_pretrained(tmp_path)
    assert torch.equal(forward("qwen3_moe", load(tmp_path)), forward("qwen3_moe", model))


def test_the_checkpoint_s_own_config_may_be_handed_over_beside_moe_offload(stored):
    folder, plain = stored("qwen3_moe")
    own = AutoConfig.from_pretrained(folder).quantization_config
    config = OffloadConfig(cache_budget="30%", arithmetic="exact")
    for given in (own, AutoQuantizationConfig.from_dict(own)):
        model = type(plain).from_pretrained(folder, moe_offload=config, quantization_config=given)
        assert torch.equal(forward("qwen3_moe", model), forward("qwen3_moe", plain))
    with pytest.raises(ConfigError, match="both moe_offload and quantization_config"):
        type(plain).from_pretrained(folder, moe_offload=config, quantization_config=own | {"weight_block_size": [8, 8]})


def test_without_moe_offload_the_method_itself_loads_it(stored):
    folder, plain = stored("gpt_oss")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=plain.dtype, experts_implementation="eager")
    assert not hasattr(model, "moe_offload")
    assert torch.equal(forward("gpt_oss", model), forward("gpt_oss", plain))


def test_fp8_without_scales_is_refused(own):
    file, tensors = own
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("up_proj.weight_scale_inv")}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.0.up_proj.weight \(float8_e4m3fn \[96, 64\]\)"):
        load(file.parent)


def test_a_stack_of_fp8_experts_that_transformers_would_not_scale_is_refused(tmp_path):
    model = build("qwen3_moe", torch.bfloat16)
    save(model, tmp_path, "fused")
    as_fp8(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("experts.down_proj")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(8, 4, 6)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.down_proj as .*which opens to torch.float8_e4m3fn .* scales"):
        load(tmp_path)


def test_an_expert_stored_otherwise_than_its_neighbours_is_named(own):
    file, tensors = own
    name = "model.layers.0.mlp.experts.3.down_proj.weight_scale_inv"
    tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj of expert 3 as .*bfloat16.*, but of expert 0 as .*float32"):
        load(file.parent)


def test_blocks_that_do_not_divide_an_expert_are_refused(own):
    file, tensors = own
    for name in [name for name in tensors if "experts" in name and name.endswith("down_proj.weight_scale_inv")]:
        tensors[name] = torch.ones(5, 6)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"Transformers cannot open .*down_proj.*\(64, 96\) not divisible .*5, 6"):
        load(file.parent)


def test_identity_experts_behind_quantized_ones_are_refused(tmp_path):
    save(build("longcat_flash", torch.bfloat16), tmp_path, "per-expert")
    as_fp8(tmp_path)
    with pytest.raises(UnsupportedModelError, match="trailing experts without weights"):
        load(tmp_path)


@pytest.mark.parametrize("where", ["quantization_config", "text_config"])
@pytest.mark.parametrize(
    ("method", "advice"),
    [("gptq", "unquantized checkpoint"), ("hqq", "`moe-offload quantize`, or, .*`moe-offload convert`")],
)
def test_other_methods_are_refused_by_name_with_what_to_do(method, advice, where, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    quant = {"quant_method": method}
    config[where] = quant if where == "quantization_config" else {"quantization_config": quant}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"already quantized with '{method}', whose experts cannot .*; .*{advice}"):
        type(build("qwen3_moe")).from_pretrained(tmp_path, moe_offload=True)


def test_codes_of_hqq_are_refused_where_no_config_tells_of_them(own):
    file, tensors = own
    config = json.loads((file.parent / "config.json").read_text())
    del config["quantization_config"]
    (file.parent / "config.json").write_text(json.dumps(config))
    tensors["model.layers.0.self_attn.q_proj.W_q"] = torch.zeros(4, 4, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj.W_q, codes of the hqq package, .*`moe-offload quantize`"):
        load(file.parent)
