"""Recipes that are damaged, or made to be harmful: one short error of ours, in no time."""

import time

import pytest

from transformers_moe_offload.builder import MoeRecipe, validate_recipe
from transformers_moe_offload.builder.recipe import Origin, Split, Upcycle
from transformers_moe_offload.errors import RecipeError

LEVELS = "".join(f"x{n}: &{n} [{', '.join([f'*{n - 1}'] * 9)}]\n" for n in range(1, 9))
BOMB = f"x0: &0 [a, a, a, a, a, a, a, a, a]\n{LEVELS}"


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> MoeRecipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return MoeRecipe.from_file(path)

    return read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{BOMB}schema: *8\n", "its aliases stand for 926,177,115 values, and at most 10,000 are made"),
        (f"{BOMB}base_model: *8\n", "its aliases stand for"),
        ("a: &a {b: *a}\n", "a value holds itself"),
        (f"[{'a, ' * 30_000}]", "it has more than 25,000 values"),
        ("#" * 500_001, "has 500,001 characters, and at most 500,000 are read"),
        ("schema: 1\n? [a]\n: b\n", "a key is not text"),
        ("schema: 1\nexperts: !!set {a}\n", "'tag:yaml.org,2002:set' is not supported"),
        ("schema: !!int x\n", "invalid literal for int"),
        ("schema: !!bool x\n", "is not valid YAML"),
        ("schema: 1\nbase_model: 2001-99-99\nexperts: 2001-99-99\n", "experts: '2001-99-99' is not a list"),
        (f"schema: 1\nbase_model: {'a' * 300}\nexperts: [{{}}, {{}}]\n", "is longer than the name of a file"),
        ("base_model: x\nexperts: true\n", "experts: True is not a list"),
        ("base_model: x\nexperts: [{source_model: y}, {source_model: z}]\nshared_experts: 1\n", "1 is not a list"),
        ("base_model: x\ngate_mode: [a]\n", r"gate_mode: \['a'\] is not one of hidden"),
        ("base_model: x\narchitecture: [a]\n", r"architecture: \['a'\] is not one that is built here"),
        ('schema: 1\nbase_model: "\\U00110000"\n', "is not valid YAML: chr"),
        ("[" * 5000, "is nested more than 100 levels deep"),
        ("schema: 1\nseed: " + "9" * 4000 + "\nbase_model: x\nexperts: [{}, {}]\n", "seed=<a number of"),
        ("schema: 1\nbase_model: x\nexperts: [{noise_scale: " + "9" * 400 + "}, {}]\n", "noise_scale=<a number of"),
        ("schema: 1\nbase_model: x\ngate: {seed: 18446744073709551616}\n", "seed=18446744073709551616"),
        ('schema: 1\nbase_model: x\nexperts: [{positive_prompts: ["\\ud800"]}, {}]\n', "is not a list of texts"),
        ('schema: 1\nbase_model: "a\\0b"\n', "is not a text|not valid YAML"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_none_is_refused_at_once_on_a_line_or_two(text, message, read):
    start = time.process_time()
    with pytest.raises(RecipeError, match=message) as refused:
        read(text)
    assert time.process_time() - start < 2
    assert len(str(refused.value)) < 1000
    str(refused.value).encode()


def test_anchors_and_merged_mappings_mean_what_they_mean(read):
    recipe = read("schema: 1\nbase_model: x\nexperts: [&e {noise_scale: 0.5}, {<<: *e, name: other}]\n")
    assert [expert.noise_scale for expert in recipe.experts] == [0.5, 0.5]


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "upcycle", "upcycle": Upcycle(num_experts=2**31)},
        {"kind": "upcycle", "upcycle": Upcycle(num_experts=2, granularity=10**12)},
        {"kind": "upcycle", "upcycle": Upcycle(num_experts=1000, granularity=1000)},
        {"kind": "split", "split": Split(num_experts=2**31)},
        {"kind": "split", "split": Split(num_experts=2**31, shared=2**31 - 2)},
    ],
)
def test_a_billion_experts_are_refused_before_they_are_counted_out(asked, tiny_dense):
    start = time.process_time()
    with pytest.raises(RecipeError, match=r"are made of the base model's blocks, which have [0-9,]+ channels"):
        validate_recipe(MoeRecipe(base_model=Origin(model=str(tiny_dense)), **asked))
    assert time.process_time() - start < 2


def test_a_model_by_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="longer than the name of a file"):
        Origin.parse("a" * 300)
    assert Origin.parse(str(tmp_path)).model == str(tmp_path)
