"""Every dense family in every container that takes it, and those that are turned away."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from builder.made import WINDOWS, recipe_of, save_dense
from transformers_moe_offload.builder import build_moe, validate_recipe
from transformers_moe_offload.builder.recipe import Expert
from transformers_moe_offload.builder.targets import CONTAINERS
from transformers_moe_offload.errors import RecipeError

PAIRS = [
    ("llama", "mixtral", {}),
    ("llama", "mixtral", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }}),
    ("mistral", "mixtral", {}),
    ("llama", "qwen2_moe", {}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen2", "qwen2_moe", WINDOWS),
    ("seed_oss", "qwen2_moe", {}),
    ("qwen3", "qwen3_moe", {}),
    ("qwen3", "qwen3_moe", {"attention_bias": True}),
    ("qwen3", "dots1", {}),
    ("qwen3", "dots1", WINDOWS),
    ("qwen3", "glm4_moe", {}),
    ("llama", "glm4_moe", {"tie_word_embeddings": True}),
    ("llama", "solar_open", {}),
    ("olmo2", "flex_olmo", {}),
    ("granite", "granitemoe", {}),
    ("granite", "granitemoeshared", {}),
    ("ernie4_5", "ernie4_5_moe", {}),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", {}),
    ("cohere2", "cohere2_moe", {}),
    ("lfm2", "lfm2_moe", {}),
    ("qwen3_5_text", "qwen3_5_moe_text", {}),
]  # fmt: skip

REFUSED = [
    ("llama", "mixtral", {"attention_bias": True}, "attention_bias"),
    ("llama", "mixtral", {"mlp_bias": True}, "mlp_bias"),
    ("llama", "qwen2_moe", {"attention_bias": True}, "attention_bias"),
    ("llama", "glm4_moe", {"attention_bias": True}, "attention_bias"),
    ("llama", "qwen3_moe", {"attention_bias": True}, "norms on queries and keys"),
    ("olmo2", "olmoe", {}, "norms after attention"),
    ("olmo3", "flex_olmo", {}, "window"),
    ("glm4", "glm4_moe", {"partial_rotary_factor": 0.5}, "norms after attention"),
    ("phi3", "phimoe", {}, "layer norms with biases"),
    ("llama", "granitemoe", {}, "factors of its own"),
    ("llama", "minimax_m2", {}, "norms on queries and keys"),
    ("llama", "afmoe", {}, "norms on queries and keys"),
    ("llama", "ernie4_5_moe", {}, "neighbours"),
    ("smollm3", "mixtral", {}, "every fourth layer"),
    ("qwen3", "qwen3_moe", WINDOWS, "window"),
    ("gemma3_text", "mixtral", {}, "cannot become a mixtral"),
    ("gemma3_text", "auto", {}, "no container holds a gemma3_text"),
]


def _id(case) -> str:
    return "-".join([*case[:2], *(key for key in case[2] if key != "max_window_layers")])


ONE_OF_EACH = {container: case for case in PAIRS for container in [case[1]]}


@pytest.mark.parametrize("container", ONE_OF_EACH)
def test_checks_of_narrow_weights_compare_as_closely_as_those_of_wide_ones(container, tmp_path):
    family, _, fields = ONE_OF_EACH[container]
    recipe = recipe_of(save_dense(tmp_path / "dense", family, **fields), container=container, dtype="bfloat16")
    info = build_moe(recipe, tmp_path / "moe", advance=lambda _: None)
    assert info.dtype == "bfloat16"
    assert max(info.checks.identity, info.checks.forced_expert) <= 5e-6


@pytest.mark.parametrize("case", PAIRS, ids=_id)
def test_copies_of_a_dense_model_as_experts_are_the_dense_model(case, tmp_path):
    family, container, fields = case
    dense = save_dense(tmp_path / "dense", family, **fields)
    recipe = recipe_of(dense, experts=[Expert()] * 3, container=container)
    info = build_moe(recipe, tmp_path / "moe", advance=lambda _: None)
    assert info.container == container
    assert info.checks.identity <= 5e-6
    assert info.checks.forced_expert <= 5e-6

    mixture, found = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(found.values())
    assert mixture.config.model_type == container
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(dense)(tokens).logits
    with torch.no_grad():
        assert (mixture(tokens).logits - expected).abs().max() <= 5e-6

    mixture.save_pretrained(tmp_path / "again")
    assert _tensors(tmp_path / "moe") == _tensors(tmp_path / "again")


def _tensors(folder) -> dict:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118, it is no dict


def test_every_container_is_tried():
    assert {container.name for container in CONTAINERS} == {container for _, container, _ in PAIRS}
    assert {(kind, one.name) for one in CONTAINERS for kind in one.dense} <= {pair[:2] for pair in PAIRS}


@pytest.mark.parametrize("case", REFUSED, ids=_id)
def test_a_model_that_only_looks_alike_is_refused_with_the_reason(case, tmp_path):
    family, container, fields, reason = case
    dense = save_dense(tmp_path / "dense", family, **fields)
    with pytest.raises(RecipeError, match=reason):
        validate_recipe(recipe_of(dense, container=container))


def test_the_first_container_that_fits_is_chosen(tmp_path):
    for family, expected in (("llama", "mixtral"), ("qwen3", "qwen3_moe"), ("qwen2", "qwen2_moe")):
        dense = save_dense(tmp_path / family, family)
        assert validate_recipe(recipe_of(dense)).container.name == expected
    some_layers = recipe_of(tmp_path / "llama", layers=(1, 3))
    assert validate_recipe(some_layers).container.name == "qwen2_moe"


def test_a_misspelt_container_is_an_error_with_a_suggestion(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'mixtral'"):
        validate_recipe(recipe_of(save_dense(tmp_path / "dense"), container="mixtrall"))
