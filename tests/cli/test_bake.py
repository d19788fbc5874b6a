"""`moe-offload bake` makes what stock Transformers loads, and says in one line what it cannot."""

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from .conftest import the_error

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Two mixtures of the adapters that ship with the project: one that can be baked, and one that cannot."""
    from transformers_moe_offload.builder import MoeRecipe, build_adapter_moe

    folder = tmp_path_factory.mktemp("mixtures")
    recipe = yaml.safe_load((EXAMPLES / "adapters.yaml").read_text())
    recipe["base_model"] = str(EXAMPLES / recipe["base_model"])
    for expert in recipe["experts"]:
        expert["source"]["adapter"] = str(EXAMPLES / expert["source"]["adapter"])
        del expert["dataset"]  # which noise does without
    recipe["gate"] = {"mode": "noise"}
    for router_per in ("ffn", "model"):
        recipe["adapter_moe"] = {"router_per": router_per}
        build_adapter_moe(MoeRecipe.from_dict(recipe), folder / router_per, advance=lambda _: None)
    return folder


def test_a_mixture_of_adapters_is_baked_and_loads(run, mixtures, tmp_path):
    done = run("bake", mixtures / "ffn", tmp_path / "out", "--container", "qwen2_moe", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "qwen2_moe: 3 experts, 1 a token (c, prose, python)" in done.stdout
    assert "checked: loads with every byte, identity" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.model_type, str(model.dtype)) == ("qwen2_moe", "torch.float32")
    assert "holds a complete checkpoint" in the_error(run("bake", mixtures / "ffn", tmp_path / "out"))
    assert run("bake", mixtures / "ffn", tmp_path / "out", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("model", (), "router_per='model', and routers of dense blocks work like router_per='ffn'"),
        ("nowhere", (), "nowhere; name one that `moe-offload build` or training has written"),
        (EXAMPLES / "models" / "tiny-moe", (), "only a mixture of adapters (adapter_moe) is baked"),
        ("ffn", ("--container", "qwen3_moe"), "a llama cannot become a qwen3_moe"),
        ("ffn", ("--dtype", "int8"), "--dtype 'int8'"),
    ],
)
def test_what_cannot_be_baked_is_one_line(source, options, message, run, mixtures, tmp_path):
    assert message in the_error(run("bake", mixtures / source, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_the_mixture_is_not_baked_into_itself(run, mixtures):
    assert "lie inside one another" in the_error(run("bake", mixtures / "ffn", mixtures / "ffn" / "out"))


def test_a_mixture_that_was_not_baked_is_not_quantized_and_no_plan_says_so(run, mixtures, tmp_path):
    result = run("quantize", mixtures / "ffn", tmp_path / "out", "--experts", "4x32", "--dry-run")
    assert "are adapters in files of their own, which are written in no other format" in the_error(result)
    assert result.stdout == ""


def test_the_plan_of_a_mixture_of_adapters_knows_what_a_token_takes_and_that_adapters_have_their_own_files(
    run, mixtures
):
    shown = run("plan", mixtures / "ffn").stdout
    assert re.search(r"experts per token +1 per layer", shown)
    assert re.search(r"expected bytes per token +.* from disk, if routing is uniform: 18 experts a token", shown)
    assert "by its index, which agrees with its config" in shown
