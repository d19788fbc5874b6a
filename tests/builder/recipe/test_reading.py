"""Recipes from files: nothing that is not known is ignored, and what goes out comes in again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.builder.recipe import (
    Dataset,
    Expert,
    Gate,
    MoeRecipe,
    Origin,
    SharedExpert,
    Stem,
    Upcycle,
)
from transformers_moe_offload.errors import RecipeError

OURS = {"schema": 1, "base_model": "me/base", "experts": [{"source": "me/one"}, {"source": "me/two@v2+me/lora"}]}


def read(**values):
    return MoeRecipe.from_dict({**OURS, **values})


def test_a_recipe_says_what_it_says():
    recipe = read(gate={"mode": "mean"}, layers=[3, 1], checks={"similarity": "error"})
    assert recipe.base_model == Origin(model="me/base")
    assert recipe.experts[1].source == Origin(model="me/two", revision="v2", adapter="me/lora")
    assert recipe.gate.mode == "mean"
    assert recipe.layers == (1, 3)
    assert recipe.checks.similarity == "error"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"experst": []}, "unknown key 'experst'; did you mean 'experts'?"),
        ({"gate": {"mod": "mean"}}, "gate: unknown key 'mod'; did you mean 'mode'?"),
        ({"gate": {"mode": "meen"}}, "gate: mode='meen' is not one of .*; did you mean 'mean'?"),
        ({"experts": [{"source": "a"}, {"positive_promts": ["x"]}]}, "experts.1: unknown key 'positive_promts'"),
        ({"experts": [{"positive_prompts": "x"}, {}]}, "experts.0.positive_prompts: 'x' is not a list"),
        ({"experts": {"a": 1}}, "experts: .* is not a list"),
        ({"experts": [{"name": "a", "source": {"model": "a"}}]}, "experts_per_token=2, but there is 1 expert; add"),
        ({"experts": []}, "experts_per_token=2, but there are 0 experts"),
        ({"experts_per_token": "2"}, "experts_per_token: '2' is not of type int"),
        ({"experts_per_token": True}, "experts_per_token: True is not of type int"),
        ({"seed": -1}, "seed=-1 is not a whole number"),
        ({"dtype": "float33"}, "dtype='float33' is not one of .*; did you mean 'float32'?"),
        ({"layers": [-1]}, r"layers=\[-1\]"),
        ({"stem": {"method": "average", "source": "x"}}, "stem: source=x takes the stem from one model"),
        ({"upcycle": {"num_experts": 2}}, "upcycle: is given, but kind is 'moe'; .* or leave upcycle: out"),
        ({"kind": "upcycle"}, "but experts: lists 2"),
        ({"kind": "split", "experts": [], "split": {"num_experts": 2, "shared": 2}}, "leaves none to be routed"),
        ({"output": {"max_shard_size": "5 apples"}}, "max_shard_size='5 apples' is not a size"),
        ({"schema": 2}, "schema: 2 is not one"),
        ({"shared_experts": [{"gated": True, "delta": True}]}, "gated and delta exclude each other"),
        ({"base_model": {"adapter": "a", "extract_rank": 4}}, "exclude each other"),
        ({"experts": [{"noise_scale": float("nan")}, {}]}, "experts.0: noise_scale=nan is not a number"),
    ],
)
def test_a_mistake_is_an_error_that_says_where_and_what_instead(values, match):
    with pytest.raises(RecipeError, match=match):
        read(**values)


names = st.text("abc/-", min_size=1, max_size=8).filter(lambda text: text.strip("/-"))
origins = st.builds(Origin, model=names, revision=st.none() | names, adapter=st.none() | names)
shares = st.floats(0.01, 0.99)
texts = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5), max_size=2)
texts = texts.map(tuple)
expert_fields = {
    "source": st.none() | origins,
    "name": st.none() | names,
    "positive_prompts": texts,
    "dataset": st.none() | st.builds(Dataset, path=names, max_tokens=st.integers(1, 9)),
    "noise_scale": shares,
    "delta_scale": shares,
}
recipes = st.one_of(
    st.builds(
        MoeRecipe,
        base_model=origins,
        experts=st.lists(st.builds(Expert, **expert_fields), min_size=2, max_size=3).map(tuple),
        shared_experts=st.lists(st.builds(SharedExpert, gated=st.booleans(), **expert_fields), max_size=1).map(tuple),
        layers=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
        gate=st.builds(Gate, mode=st.sampled_from(["mean", "ridge"]), scale=st.just("auto") | shares),
        stem=st.builds(Stem, method=st.sampled_from(["base", "ties"]), density=shares),
    ),
    st.builds(MoeRecipe, base_model=origins, kind=st.just("upcycle"), upcycle=st.none() | st.builds(
        Upcycle, num_experts=st.integers(2, 4), granularity=st.integers(1, 3), reinitialize=shares
    )),
)  # fmt: skip


@given(recipe=recipes)
def test_what_is_written_is_read_again(recipe):
    assert MoeRecipe.from_dict(recipe.to_dict()) == recipe


def test_paths_are_relative_to_the_recipes_file(tmp_path):
    for name in ("base", "lora", "tokenizer"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").write_text("text")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "schema: 1\nbase_model: base\ntokenizer: tokenizer\n"
        "experts: [{source: base+lora, dataset: text.txt}, {source: me/on-the-hub@main, dataset: {path: text.txt}}]\n"
    )
    recipe = MoeRecipe.from_file(file)
    assert recipe.base_model.model == str(tmp_path / "base")
    assert recipe.tokenizer == str(tmp_path / "tokenizer")
    assert recipe.experts[0].source == Origin(model=str(tmp_path / "base"), adapter=str(tmp_path / "lora"))
    assert recipe.experts[1].source == Origin(model="me/on-the-hub", revision="main")
    assert {expert.dataset for expert in recipe.experts} == {Dataset(path=str(tmp_path / "text.txt"))}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("schema: 1\nschema: 1\n", "'schema' is there twice"),
        ("schema: [", "is not valid YAML"),
        ("just text", "holds a str, not a mapping"),
        ("", "is empty; see the documentation"),
        ("schema: 1\nbase_model: !!python/object:os.system x\n", "is not valid YAML"),
        ("schema: 1\n", "base_model is missing"),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error(tmp_path, content, match):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=match):
        MoeRecipe.from_file(tmp_path / "recipe.yaml")


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        MoeRecipe.from_file(tmp_path / "recipe.yaml")


def test_kinds_without_texts_have_routers_of_noise_unless_told_otherwise():
    assert MoeRecipe(base_model="a", kind="upcycle").gate.mode == "noise"
    assert MoeRecipe(base_model="a", kind="upcycle", gate=Gate(mode="ridge")).gate.mode == "ridge"
    assert read().gate.mode == "ridge"
