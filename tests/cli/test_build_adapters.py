"""`moe-offload build` with a recipe for a mixture of adapters."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from .conftest import the_error

RECIPE = Path(__file__).parents[2] / "examples" / "adapters.yaml"


@pytest.fixture
def recipe(tmp_path):
    """The example's, as a mapping to change, and how to write it down again."""
    values = yaml.safe_load(RECIPE.read_text())
    values["base_model"] = str(RECIPE.parent / values["base_model"])
    for expert in values["experts"]:
        expert["source"]["adapter"] = str(RECIPE.parent / expert["source"]["adapter"])

    def write():
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return values, write


def test_the_example_is_built_and_loads(run, tmp_path):
    shown = run("build", RECIPE, tmp_path / "out", "--dry-run")
    assert shown.exit_code == 0
    assert "adapter_moe: 3 adapters on tiny-dense, 1 a token" in shown.stdout
    assert not (tmp_path / "out").exists()
    built = run("build", RECIPE, tmp_path / "out")
    assert built.exit_code == 0, built.output
    assert "loads with every byte, adapters alone" in built.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", moe_offload=True)
    assert model.config.adapters == ["c", "prose", "python"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_moe": {"router_per": "layer"}}, "router_per='layer' is not one of ffn, linear, model"),
        ({"adapter_moe": {"routers": "ffn"}}, "adapter_moe: unknown key 'routers'; did you mean 'router_per'?"),
        ({"experts_per_token": 4}, "experts_per_token=4, but there are 3 experts"),
        ({"container": "mixtral"}, "kind: adapter_moe has no container"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_says_what_to_change(change, message, recipe, run, tmp_path):
    values, write = recipe
    values |= change
    assert message in the_error(run("build", write(), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
