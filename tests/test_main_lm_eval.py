"""lm-evaluation-harness from the command line, where it is installed: its own models and ours, plain and offloaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parent.parent
TINY_MOE = ROOT / "examples" / "models" / "tiny-moe"
TASK = ["--include_path", str(ROOT / "examples" / "evaluation"), "--tasks", "moe_offload_prose", "--limit", "2"]


def results(*command, folder):
    """Run `python -m COMMAND` on a task of the examples, and return the figures that it writes, in full."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-m", *command, *TASK, "--output_path", str(folder)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = folder.rglob("results_*.json")
    return json.loads(written.read_text())["results"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The figures of the harness without this package, one text at a time and in batches."""
    return {
        size: results(
            *("lm_eval", "run", "--model", "hf", "--batch_size", size, "--device", "cpu"),
            *("--model_args", f"pretrained={TINY_MOE}"),
            folder=tmp_path_factory.mktemp("plain"),
        )
        for size in ("1", "4")
    }


@pytest.mark.parametrize(
    ("subcommand", "model", "batch_size", "arguments"),
    [
        (["run"], "hf", "4", f"pretrained={TINY_MOE},moe_offload=auto"),
        ([], "hf", "4", json.dumps({"pretrained": str(TINY_MOE), "moe_offload": {"cache_budget": "40%"}})),
        (["run"], "hf-reuse", "1", json.dumps({"pretrained": str(TINY_MOE), "moe_offload": {"cache_budget": "40%"}})),
    ],
    ids=["hf with words", "hf with JSON, without a subcommand", "hf-reuse"],
)
def test_offloaded_models_have_the_plain_figures_to_the_last_digit(
    subcommand, model, batch_size, arguments, plain, tmp_path
):
    found = results(
        *("transformers_moe_offload", "lm_eval", *subcommand, "--model", model, "--batch_size", batch_size),
        *("--device", "cpu", "--model_args", arguments),
        folder=tmp_path,
    )
    assert found == plain[batch_size]


def test_the_harness_keeps_the_models_that_have_nothing_to_do_with_us(tmp_path):
    assert results("transformers_moe_offload", "lm_eval", "run", "--model", "dummy", folder=tmp_path)
