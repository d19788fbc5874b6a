"""What `moe-offload convert` makes of the layout of mixtral-offloading, against an independent reader of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from transformers_moe_offload import CheckpointError, ConfigError, HqqFormat, OffloadConfig, UnsupportedModelError
from transformers_moe_offload.hf.interop.mixtral_offloading import Matrix, MixtralOffloading
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.tensor_files.index import read_header
from zoo.build import build

from . import mixtral_layout as layout

HIDDEN, INTERMEDIATE = 64, 96
SHAPES = {"w1": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE), "w3": (INTERMEDIATE, HIDDEN)}
CASES = {
    "as-published": {"experts": (2, 16), "attention": (4, 16), "coded_meta": True},
    "plain-meta": {"experts": (2, 16), "attention": (2, 16)},
    "4-bit": {"experts": (4, 32), "attention": (4, 16)},
    "3-bit": {"experts": (3, 32), "attention": (3, 16), "coded_meta": True},
    "interleaved": {"experts": (2, 16), "attention": (4, 16), "is_interleaved": True},
    "interleaved-3-bit": {"experts": (3, 32), "attention": (3, 16), "coded_meta": True, "is_interleaved": True},
}


@pytest.fixture(scope="module")
def mixtral():
    return build("mixtral")


@pytest.fixture
def source(mixtral, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    layout.write(mixtral, folder, **CASES["as-published"])
    return folder


def opened(folder):
    return MixtralOffloading.open(folder, meta_model(str(folder), torch.float16, local_files_only=True).model)


@pytest.mark.parametrize("case", CASES)
def test_the_converted_model_computes_with_what_the_layout_stands_for(case, mixtral, run_convert, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    layout.write(mixtral, source, **CASES[case])
    run_convert(source, folder)
    token_ids = torch.arange(18).view(2, 9)
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload={"cache_budget": "40%", "arithmetic": "exact"})
    assert type(model) is MixtralForCausalLM
    with torch.no_grad():
        logits = model(token_ids).logits
    assert model.moe_offload.stats().asked > 0
    plain = model.moe_offload.restore()
    for number, part in enumerate(plain.model.layers):
        for expert in range(8):
            file = source / f"expert_{number}_{expert}.safetensors"
            w1, w2, w3 = (
                layout.read(file, name, shape, *CASES[case]["experts"], rounds_meta=True)
                for name, shape in SHAPES.items()
            )
            assert torch.equal(part.mlp.experts.gate_up_proj[expert], torch.cat([w1, w3]))
            assert torch.equal(part.mlp.experts.down_proj[expert], w2)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = part.self_attn.get_submodule(name).weight
            stored = f"model.layers.{number}.self_attn.{name}"
            file = source / "trunk.safetensors"
            expected = layout.read(file, stored, weight.shape, *CASES[case]["attention"], rounds_meta=False)
            assert torch.equal(weight, expected)
    trunk = load_file(source / "trunk.safetensors")
    assert torch.equal(plain.model.layers[1].mlp.gate.weight, trunk["model.layers.1.block_sparse_moe.gate.weight"])
    plain.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(plain(token_ids).logits, logits)


def test_codes_and_meta_of_the_real_hqq_are_read_as_it_reads_them(tmp_path):
    hqq = pytest.importorskip("hqq.core.quantize")
    for nbits, group_size in ((4, 64), (3, 32), (2, 16)):
        weight = torch.randn(192, 128, generator=torch.Generator().manual_seed(0))
        options = {"nbits": nbits, "group_size": group_size, "axis": 0, "optimize": False, "device": "cpu"}
        codes, meta = hqq.Quantizer.quantize(weight, **options)
        meta_options = {"nbits": 8, "optimize": False, "device": "cpu", "compute_dtype": torch.float32}
        scale_q, meta_scale = hqq.Quantizer.quantize(meta["scale"], group_size=128, axis=0, **meta_options)
        zero_q, meta_zero = hqq.Quantizer.quantize(meta["zero"], group_size=None, channel_wise=False, **meta_options)
        tensors = {"W_q": codes, "meta.scale_q": scale_q, "meta.zero_q": zero_q}
        for name, values in (("scale", meta_scale), ("zero", meta_zero)):
            tensors |= {f"meta.meta_{name}.{part}": values[part] for part in ("scale", "zero")}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "w.safetensors")
        stored = {tensor.name: tensor for tensor in read_header(tmp_path / "w.safetensors")}
        found = Matrix("w", stored, 192, 128)
        assert (found.nbits, found.group_size) == (nbits, group_size)
        as_float = {"compute_dtype": torch.float32}
        meta |= as_float | {
            "scale": hqq.Quantizer.dequantize(scale_q, meta_scale | as_float),
            "zero": hqq.Quantizer.dequantize(zero_q, meta_zero | as_float),
        }
        assert torch.equal(found.weights(torch.float32), hqq.Quantizer.dequantize(codes, meta))


def test_layers_may_have_formats_of_their_own(mixtral, tmp_path):
    layout.write(mixtral, tmp_path, experts=(2, 16))
    other = tmp_path / "other"
    other.mkdir()
    layout.write(mixtral, other, experts=(4, 32))
    for expert in range(8):
        (other / f"expert_2_{expert}.safetensors").rename(tmp_path / f"expert_2_{expert}.safetensors")
    formats = opened(tmp_path).formats()
    assert formats.default == HqqFormat(nbits=2, group_size=16, axis=0, meta_nbits=16)
    assert formats.layers == {"2": HqqFormat(nbits=4, group_size=32, axis=0, meta_nbits=16)}
    (tmp_path / "expert_1_5.safetensors").write_bytes((tmp_path / "expert_2_5.safetensors").read_bytes())
    with pytest.raises(UnsupportedModelError, match=r"layers.1.*0.w1 in 2-bit.*, .*5.w1 in 4-bit.* quantized alike"):
        opened(tmp_path).formats()


def test_loading_it_unconverted_names_the_command_that_converts_it(source):
    with pytest.raises(CheckpointError, match=r"w1.W_q, codes of the hqq package, .*`moe-offload convert`"):
        AutoModelForCausalLM.from_pretrained(source, moe_offload=True)


def test_an_expert_that_the_index_lacks_is_named(source):
    index = source / layout_index()
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.2.block_sparse_moe.experts.5.w1.W_q"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"does not name model.layers.2.block_sparse_moe.experts.5.w1.W_q"):
        opened(source)


def test_an_index_that_points_out_of_the_folder_is_refused(source):
    index = source / layout_index()
    index.write_text(index.read_text().replace("expert_0_0.", "../expert_0_0."))
    with pytest.raises(CheckpointError, match=r"'../expert_0_0.safetensors', which is not a file inside its folder"):
        opened(source)


def test_another_architecture_is_sent_to_quantize(checkpoint):
    with pytest.raises(UnsupportedModelError, match=r"is for Mixtral, but .* a qwen3_moe; use `moe-offload quantize`"):
        opened(checkpoint)


def test_a_config_of_another_size_is_told(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    with pytest.raises(CheckpointError, match=r"W_q is uint8 \[4, 384\], .* 100 x 64 weights; the config does not"):
        opened(source).formats()


def test_nothing_is_quantized_with_groups_along_the_outputs(checkpoint):
    with pytest.raises(ConfigError, match="cannot be quantized with axis=0, which is for reading only; choose axis=1"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint, moe_offload=OffloadConfig(experts=HqqFormat(axis=0, group_size=16))
        )


def layout_index():
    return "model.safetensors.index.json"
