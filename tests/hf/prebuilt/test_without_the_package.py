"""Where this package is missing, a prebuilt checkpoint does not load, and says why."""

import pytest
from typer.testing import CliRunner

from moe_offload_cli.main import app
from programs import TORCH, run_program
from transformers_moe_offload.hf.prebuilt import moe_offload_required
from transformers_moe_offload.hf.prebuilt.names import AUTO_CLASSES, GUARD
from zoo.build import build

WITHOUT_US = """
import sys
sys.modules["transformers_moe_offload"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

folder = sys.argv[1]
for model_class in (AutoModelForCausalLM, Qwen3MoeForCausalLM):
    for options in ({}, {"trust_remote_code": True}):
        try:
            print(type(model_class.from_pretrained(folder, **options)).__name__)
        except Exception as error:
            print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    build("qwen3_moe").save_pretrained(folder / "plain")
    result = CliRunner().invoke(app, ["quantize", str(folder / "plain"), str(folder / "8bit"), "--experts", "8x16"])
    assert result.exit_code == 0, result.output
    return folder / "8bit"


def test_no_class_loads_it_without_the_package(prebuilt, tmp_path):
    alone = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = run_program("python", "-c", WITHOUT_US, prebuilt, variables=alone, imported=TORCH)
    answers = result.stdout.splitlines()
    assert len(answers) == 4, result.stderr
    for answer in answers:
        assert answer.startswith(("OSError Error no file named model.safetensors", "ImportError the experts of this"))
    trusting = [answer for answer in answers if answer.startswith("ImportError")]
    assert len(trusting) == 1  # only Auto classes run code
    assert all("pip install transformers-moe-offload" in answer for answer in trusting)


def test_every_auto_class_that_the_config_refers_to_has_a_placeholder():
    assert all(hasattr(moe_offload_required, name) for name in AUTO_CLASSES)


def test_with_the_package_trusting_remote_code_gives_the_stock_class(prebuilt, monkeypatch, tmp_path):
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, Qwen3MoeForCausalLM, Qwen3MoeModel

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    assert type(AutoModelForCausalLM.from_pretrained(prebuilt, trust_remote_code=True)) is Qwen3MoeForCausalLM
    assert type(AutoModel.from_pretrained(prebuilt, trust_remote_code=True)) is Qwen3MoeModel
    assert transformers.Qwen3MoeForCausalLM._auto_class is None


def test_the_guard_in_the_folder_is_the_one_in_the_package(prebuilt):
    assert (prebuilt / GUARD.name).read_text() == GUARD.read_text()
