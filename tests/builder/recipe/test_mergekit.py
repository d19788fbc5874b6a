"""mergekit-moe's files are read as they are meant there, and a misspelt key is not ignored as it is there."""

import pytest

from transformers_moe_offload.builder.recipe import Expert, Gate, MoeRecipe, Origin, SharedExpert
from transformers_moe_offload.errors import RecipeError

THEIRS = {
    "base_model": "me/base",
    "gate_mode": "hidden_avg",
    "dtype": "bfloat16",
    "experts_per_token": 1,
    "experts": [
        {"source_model": "me/one", "positive_prompts": ["a"], "negative_prompts": ["b"], "noise_scale": 0.1},
        {"source_model": "me/base+me/lora", "positive_prompts": ["c"], "residual_scale": 0.5},
    ],
}


def test_a_recipe_of_mergekit_is_read_with_its_meaning():
    assert MoeRecipe.from_dict(THEIRS) == MoeRecipe(
        base_model="me/base",
        dtype="bfloat16",
        experts_per_token=1,
        gate=Gate(mode="hidden_avg", scoring="mergekit", site="layer_input"),
        experts=(
            Expert(source="me/one", positive_prompts=("a",), negative_prompts=("b",), noise_scale=0.1),
            Expert(source=Origin(model="me/base", adapter="me/lora"), positive_prompts=("c",), residual_scale=0.5),
        ),
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("hidden", "hidden"),
        ("hidden_last", "hidden"),
        ("random", "random"),
        ("uniform_random", "uniform"),
        (None, None),
    ],
)
def test_gate_modes_have_other_names_there(theirs, ours):
    values = {**THEIRS, "gate_mode": theirs} if theirs else {k: v for k, v in THEIRS.items() if k != "gate_mode"}
    assert MoeRecipe.from_dict(values).gate.mode == (ours or "hidden")


@pytest.mark.parametrize(
    ("architecture", "container"), [("mixtral", "mixtral"), ("Qwen3", "qwen3_moe"), ("qwen", "auto"), (None, "auto")]
)
def test_architectures_are_beginnings_of_names(architecture, container):
    assert MoeRecipe.from_dict({**THEIRS, "architecture": architecture}).container == container


def test_a_shared_expert_with_prompts_is_gated():
    shared = [{"source_model": "me/one", "positive_prompts": ["x"]}, {"source_model": "me/two"}]
    assert MoeRecipe.from_dict({**THEIRS, "shared_experts": shared}).shared_experts == (
        SharedExpert(source="me/one", positive_prompts=("x",), gated=True),
        SharedExpert(source="me/two"),
    )


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"experts_per_tok": 1}, "'experts_per_tok'; did you mean 'experts_per_token'.*read as one of mergekit-moe"),
        ({"gate_mode": "hiden"}, "did you mean 'hidden'"),
        ({"architecture": "deepseek"}, "needs code from the Hub"),
        ({"experts": [{"source": "x"}]}, "experts.0: unknown key 'source'; did you mean 'source_model'"),
        ({"experts": ["x"]}, "experts.0: 'x' is not a mapping"),
    ],
)
def test_what_mergekit_would_ignore_is_an_error(values, match):
    with pytest.raises(RecipeError, match=match):
        MoeRecipe.from_dict({**THEIRS, **values})
