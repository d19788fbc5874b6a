"""What is made of a checkpoint that another method has quantized is what is made of it opened by that method."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformers_moe_offload import CheckpointError, ExpertFormats, HqqFormat, OffloadConfig
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.hf.prebuilt.source import Quantization, contents
from transformers_moe_offload.hf.prebuilt.writer import Prebuilt, write_prebuilt
from zoo.build import build, save

from ..other_quantizers.made import KINDS, as_fp8

FORMAT = HqqFormat(nbits=4, group_size=16)


def quantize(source, folder, config):
    """The weight files that are written, by name."""
    planned = meta_model(str(source), local_files_only=True)
    layers, dense = contents(Quantization.of(planned.model, config, planned.dtype, planned.opener), planned.fetch())
    write_prebuilt(folder, Prebuilt(layers, dense, {}), {}, workers=1, advance=lambda nbytes: None)
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        OffloadConfig(experts=FORMAT),
        OffloadConfig(experts=ExpertFormats(default=FORMAT, layers={"0": None}), dense=FORMAT),
    ],
    ids=["experts", "dense too, and a layer without a format"],
)
def test_the_files_are_those_of_the_opened_checkpoint_byte_for_byte(name, config, tmp_path):
    model = build(name, torch.bfloat16)
    save(model, tmp_path / "stored", "per-expert")
    rewrite, method = KINDS[name]
    rewrite(tmp_path / "stored")
    opened = type(model).from_pretrained(tmp_path / "stored", dtype="auto", quantization_config=deepcopy(method))
    opened.save_pretrained(tmp_path / "opened", save_original_format=False)
    written = quantize(tmp_path / "stored", tmp_path / "a", config)
    assert written == quantize(tmp_path / "opened", tmp_path / "b", config)
    assert len(written) > 1


@pytest.fixture
def fp8(tmp_path):
    """The file of an FP8 checkpoint and its tensors, to change."""
    save(build("qwen3_moe", torch.bfloat16), tmp_path, "per-expert")
    as_fp8(tmp_path)
    return tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("self_attn.q_proj.weight", r"holds model.layers.1.self_attn.q_proj.weight in float8_e4m3fn, and no scales"),
        (
            "mlp.experts.2.up_proj.weight",
            r"holds 7 tensors for model.layers.1.mlp.experts.gate_up_proj, but",
        ),
    ],
)
def test_weights_without_their_scales_are_refused(fp8, tmp_path, weight, message):
    file, tensors = fp8
    del tensors[f"model.layers.1.{weight}_scale_inv"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        quantize(file.parent, tmp_path / "written", OffloadConfig(experts=FORMAT))
    assert not list((tmp_path / "written").glob("*index.json"))
