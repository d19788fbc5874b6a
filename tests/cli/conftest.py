"""The command, run in this process, and small checkpoints to run it on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf.other_quantizers.made import as_fp8
from moe_offload_cli.main import app
from zoo.build import build, save

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


@pytest.fixture(scope="session")
def tiny_moe() -> Path:
    return TINY_MOE


@pytest.fixture
def run(monkeypatch):
    """Run `moe-offload` with these arguments; the result has `exit_code`, `stdout` and `stderr`."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, **options):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)

    return run


@pytest.fixture
def linked(tmp_path):
    """Make a folder with the tiny MoE's files, weights as links, less the ones left out."""

    def linked(without: str = "nothing", **overrides) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for file in TINY_MOE.iterdir():
            if not file.match(without):
                place = folder / file.name
                place.symlink_to(file) if file.suffix == ".safetensors" else shutil.copyfile(file, place)
        for name, changes in overrides.items():
            file = folder / f"{name}.json"
            content = json.loads(file.read_text()) | changes
            file.unlink()
            file.write_text(json.dumps(content))
        return folder

    return linked


@pytest.fixture
def fp8(tmp_path) -> Path:
    """A model of four small layers in FP8."""
    folder = tmp_path / "fp8"
    save(build("qwen3_moe", torch.bfloat16), folder, "per-expert")
    as_fp8(folder)
    return folder


@pytest.fixture
def dense_model(tmp_path) -> Path:
    """The config and tokenizer of a model without experts."""
    folder = tmp_path / "dense"
    shutil.copytree(TINY_MOE, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1}
    config |= {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 4096}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def the_error(result) -> str:
    """The one line a failed command leaves on stderr."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith("Loading weights")]
    assert len(lines) == 1, result.stderr
    return lines[0]
