"""Each example lowers the loss on text that it was not trained on, and writes to a folder of its own."""

import random
import re
from pathlib import Path

import pytest

from programs import run_program

EXAMPLES = Path(__file__).parents[2] / "examples"


def queries(folder):
    """Write text that the model was not trained on."""
    draw = random.Random(0)
    lines = [
        f"SELECT c{draw.randrange(9)} FROM t{draw.randrange(9)} WHERE id = {draw.randrange(99)};" for _ in range(700)
    ]
    (folder / "text").mkdir()
    (folder / "text" / "queries.sql").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("finetune_router", "model.safetensors"),
        ("finetune_experts_lora", "adapter_model.safetensors"),
        ("finetune_chosen_experts", "model.safetensors"),
    ],
)
def test_an_example_lowers_held_out_loss_and_writes_what_it_says(name, written, tmp_path):
    queries(tmp_path)
    options = ("--steps", "5", "--text", "text", "--output", "out")
    done = run_program("python", EXAMPLES / f"{name}.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "held-out loss" in done.stdout
    assert (tmp_path / "out" / written).is_file()
    assert (tmp_path / "out" / "loss.png").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_file() == (written == "model.safetensors"), "chat needs it"
    assert "longer than the specified maximum" not in done.stderr


def test_an_example_that_has_not_lowered_the_loss_says_why_it_fails(tmp_path):
    queries(tmp_path)
    options = ("--steps", "1", "--learning-rate", "0", "--text", "text", "--output", "out")
    done = run_program("python", EXAMPLES / "finetune_router.py", *options, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"^exit status 1: held-out loss did not fall \(\S+ before, \S+ after\)$", done.stderr, re.M)


def test_no_two_examples_write_to_one_folder_and_none_beside_what_another_has_written(tmp_path):
    sources = [file.read_text(encoding="utf-8") for file in sorted(EXAMPLES.glob("finetune_*.py"))]
    written = [re.search(r'output="([\w-]+)", kind="(\w+)"', source).groups() for source in sources]
    assert len({folder for folder, _ in written}) == len(written) == 3
    (tmp_path / "config.json").write_text("{}")
    done = run_program("python", EXAMPLES / "finetune_experts_lora.py", "--output", tmp_path)
    assert done.returncode == 2
    assert "holds model files, which would be loaded together with this adapter" in done.stderr


def test_grpo_trains_with_the_routes_of_its_rollouts(tmp_path):
    """Where trl is installed; `tox -e clients` runs the same line of the documentation in an environment with it."""
    pytest.importorskip("trl")
    done = run_program("python", EXAMPLES / "grpo_router_replay.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    own, replayed = re.findall(r"(\d+) of ([\d,]+) routes differ, divergence ([\d.]+)", done.stdout)
    assert int(own[0]) > 0
    assert replayed[:2] == ("0", own[1])
    assert float(replayed[2]) < float(own[2])
