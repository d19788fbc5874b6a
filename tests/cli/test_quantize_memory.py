"""Quantizing takes memory for one expert a worker, however many experts there are."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

MIB = 2**20
PEAK_AFTER_EACH = """
import sys
from typer.testing import CliRunner
from moe_offload_cli.main import app

def peak(*options):
    assert CliRunner().invoke(app, ["quantize", *sys.argv[1:], *options]).exit_code == 0
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))

print(peak("--dry-run"), peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_some_experts_and_neither_a_shard_nor_the_model(tmp_path):
    config = Qwen3MoeConfig(
        hidden_size=256,
        moe_intermediate_size=512,
        num_experts=64,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=100,
        dtype=torch.bfloat16,
    )
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain", max_shard_size="60MB")
    expert, experts = 3 * 256 * 512 * 2, 2 * 64 * 3 * 256 * 512 * 2
    assert experts > 90 * MIB
    command = [sys.executable, "-c", PEAK_AFTER_EACH, tmp_path / "plain", tmp_path / "quantized"]
    options = ["--experts", "4x64", "--dense", "4x64", "--workers", "2"]
    before, after = subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout.split()
    grown = (int(after) - int(before)) * 1024
    assert grown < 48 * expert < experts / 2, f"{grown / MIB:.1f} MiB more than the plan took"
