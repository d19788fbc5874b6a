"""`moe-offload build` shows its plan, writes what loads, and says in one line what cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

MODELS = Path(__file__).parents[2] / "examples" / "models"


@pytest.fixture
def recipe(tmp_path):
    """A recipe for the specialists that ship with the repository."""

    def recipe(**changes) -> Path:
        values = {
            "schema": 1,
            "base_model": str(MODELS / "tiny-dense"),
            "gate": {"mode": "noise"},
            "layers": [0, 2, 3],
            "experts": [
                {"name": name, "source": {"adapter": str(MODELS / f"tiny-dense-{name}")}} for name in ("c", "prose")
            ],
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps({**values, **changes}))
        return tmp_path / "recipe.yaml"

    return recipe


def test_a_dry_run_shows_what_would_be_built_and_writes_nothing(run, recipe, tmp_path):
    result = run("build", recipe(), tmp_path / "moe", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "qwen2_moe: 2 experts, 2 a token, in 3 of 6 layers; bfloat16" in result.stdout
    assert "expert    prose" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_mixture_is_built_and_loads(run, recipe, tmp_path):
    result = run("build", recipe(), tmp_path / "moe")
    assert result.exit_code == 0, result.output
    assert "loads with every byte" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=4).shape == (1, 7)

    again = run("build", recipe(), tmp_path / "moe")
    assert again.exit_code == 2
    assert "holds a complete checkpoint" in again.stderr


def test_what_cannot_be_is_said_in_one_line(run, recipe, tmp_path):
    for changes, message in (
        ({"experst": []}, "did you mean 'experts'"),
        ({"container": "mixtral"}, "mixtral has experts in every layer, and layers 1, 4, 5 are to have none"),
        ({"base_model": str(tmp_path / "nowhere")}, "cannot read the config"),
    ):
        result = run("build", recipe(**changes), tmp_path / "moe")
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert not (tmp_path / "moe").exists()


def test_an_adapter_that_is_in_no_folder_is_said_to_be_in_none(run, recipe, tmp_path):
    """Else the error for a misspelt folder would name the Hub alone, which was never meant."""
    experts = [{"source": {"adapter": "models/typo"}}, {"source": {"adapter": str(MODELS / "tiny-dense-c")}}]
    result = run("build", recipe(experts=experts), tmp_path / "moe", "--local-files-only")
    assert result.exit_code == 2, result.output
    assert "cannot read the adapter models/typo: there is no such folder, and from the Hub" in result.stderr


@pytest.mark.parametrize("kind", ["moe", "adapter_moe"])
def test_a_dry_run_notices_that_a_text_file_is_missing(run, recipe, tmp_path, kind):
    experts = [
        {"name": name, "source": {"adapter": str(MODELS / f"tiny-dense-{name}")}, "dataset": "typo.txt"}
        for name in ("c", "prose")
    ]
    changes = {"layers": None, "experts_per_token": 1} if kind == "adapter_moe" else {}
    result = run("build", recipe(kind=kind, experts=experts, **changes), tmp_path / "moe", "--dry-run")
    assert result.exit_code == 2, result.output
    assert "expert 'c' has the dataset typo.txt, and there is no such file" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("kind", ["moe", "adapter_moe"])
def test_what_was_shown_with_the_plan_is_not_logged_again(run, recipe, tmp_path, caplog, kind):
    changes = {"layers": None, "experts_per_token": 1} if kind == "adapter_moe" else {}
    base = shutil.copytree(MODELS / "tiny-dense", tmp_path / "base", ignore=shutil.ignore_patterns("README.md"))
    result = run("build", recipe(kind=kind, base_model=str(base), **changes), tmp_path / "moe")
    assert result.exit_code == 0, result.output
    assert result.output.count("is not known to us") == 1
    assert not [message for message in caplog.messages if "is not known to us" in message]
