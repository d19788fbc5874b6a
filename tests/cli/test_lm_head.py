"""`--lm-head`: the output embedding has its own format, the plan counts it, and one that is tied is refused."""

import re

import pytest
from transformers import AutoModelForCausalLM

from transformers_moe_offload import HqqFormat
from zoo.build import build

from .conftest import the_error


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "quantized"


def test_the_head_has_the_format_that_was_asked_for_and_the_plan_counts_it(run, folder, tmp_path):
    source = tmp_path / "source"
    build("qwen3_moe").save_pretrained(source)
    options = ("--experts", "4x16", "--dense", "4x16", "--lm-head", "8x16")
    planned = run("plan", source, *options)
    assert planned.exit_code == 0, planned.output
    result = run("quantize", source, folder, *options, "--no-optimize")
    assert result.exit_code == 0, result.output
    formats = r"4-bit, groups of 16; output embedding: 8-bit, groups of 16"
    assert re.search(rf"dense\s+{formats}\s+5\.03; 9\.03\s", result.stdout)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.moe_offload.config.lm_head == HqqFormat(nbits=8, group_size=16, optimize=False)
    dense_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    of_folder = run("plan", folder)
    for shown in (planned, of_folder):
        assert re.search(rf"dense weights\s+{dense_bytes / 1024:.1f} KiB", shown.stdout)
    assert "dense layers 4-bit, groups of 16; output embedding 8-bit, groups of 16" in of_folder.stdout


@pytest.mark.parametrize("command", ["plan", "quantize", "chat"])
def test_a_head_that_is_tied_is_refused_by_the_option_s_name(run, tiny_moe, folder, command):
    arguments = {"plan": (), "quantize": (folder,), "chat": ("--prompt", "x")}[command]
    error = the_error(run(command, tiny_moe, *arguments, "--lm-head", "8x64"))
    assert "--lm-head 8-bit, groups of 64: lm_head of Qwen3MoeForCausalLM shares its matrix with the input" in error
    assert not folder.exists()
