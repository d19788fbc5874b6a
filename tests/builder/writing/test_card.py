"""What the card of a mixture says: to the Hub in its header, to people below it."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from transformers_moe_offload.builder.gates import GateReport, LayerReport
from transformers_moe_offload.builder.licences import Licence, judged
from transformers_moe_offload.builder.plan.tensors import Parameters
from transformers_moe_offload.builder.recipe import Dataset, Expert, MoeRecipe, Origin
from transformers_moe_offload.builder.sources import Ancestor
from transformers_moe_offload.builder.writing.card import model_card
from transformers_moe_offload.builder.writing.info import CheckReport, MoeBuildInfo

BASE, CODE, LOCAL = Ancestor("org/base", "a" * 40), Ancestor("org/code", "b" * 40), Ancestor("my-tune", None)


def info(sources=(BASE, CODE, LOCAL), **fields) -> MoeBuildInfo:
    layers = (LayerReport(0, 1.5, 2.0, 0.7, (0.9, 0.8)), LayerReport(1, float("inf"), 1.0))
    values = {
        "folder": Path("out"),
        "container": "mixtral",
        "experts": ("general", "code"),
        "experts_per_token": 1,
        "layers": (0, 1),
        "dtype": "bfloat16",
        "nbytes": 2000,
        "parameters": Parameters(stem=1_000, experts=2_000, routers=30, shared=0, active=2_030),
        "sources": sources,
        "gates": GateReport("ridge", ("general", "code"), (100, 100), layers),
        "checks": CheckReport(0.0, 0.0, True, {}),
        "warnings": (),
    }
    return MoeBuildInfo(**values | fields)


def card(
    made: MoeBuildInfo | None = None, recipe=None, licences=("apache-2.0", "llama3.1"), name="me/two", **options
) -> ModelCard:
    verdict = judged([Licence(source.name, id) for source, id in zip((BASE, CODE), licences, strict=True)])
    recipe = recipe or MoeRecipe(base_model="org/base", experts=(Expert(), Expert(source="org/code")))
    return ModelCard(model_card(name, made or info(), recipe.to_dict(), verdict, **options))


def test_the_hub_learns_of_the_base_models_and_that_they_were_merged():
    data = card().data
    assert data.base_model == ["org/base", "org/code"]
    assert data.base_model_relation == "merge"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["moe", "merge", "moe-offload"]


def test_tags_of_the_recipe_come_after_ours():
    assert card(tags=("legal", "moe")).data.tags == ["moe", "merge", "moe-offload", "legal"]


def test_models_that_are_not_on_the_hub_are_not_linked():
    assert card(info((LOCAL,))).data.base_model is None
    assert card(info((BASE, LOCAL))).data.base_model == "org/base"
    assert card(info((BASE, LOCAL))).data.get("base_model_relation") is None


def test_the_licence_is_the_one_that_the_sources_come_to_with_its_notice():
    made = card()
    assert made.data.license == "llama3.1"
    assert "Built with Llama." in made.text
    assert "| [org/code](https://huggingface.co/org/code) | `bbbb" in made.text
    unclear = card(licences=("apache-2.0", None)).data
    assert (unclear.license, unclear.license_name) == ("other", "apache-2.0 and no licence")
    assert card(licences=(None, None)).data.license is None


def test_it_says_how_to_load_it_with_and_without_this_package():
    text = card().text
    assert text.count('from_pretrained("me/two"') == 3
    assert '"me/two", moe_offload=' in text
    assert text.lstrip().startswith("# two\n")


def test_parameters_and_gates_are_in_tables():
    text = card().text
    for row in (
        "| stem (attention, embeddings, norms, head) | 1,000 |",
        "| experts | 2,000 |",
        "| all | 3,030 |",
        "| active, for one token | 2,030 |",
        "| 0 | 1.5 | 2 | 0.70 | 85% |",
        "| 1 | inf | 1 |  |  |",
    ):
        assert row in text
    assert "shared" not in text
    shared = info(parameters=Parameters(stem=1, experts=2, routers=3, shared=4, active=10))
    assert "| shared experts | 4 |" in card(shared).text


def test_the_recipe_is_in_it_and_can_be_read_again():
    recipe = MoeRecipe(base_model="org/base", experts=(Expert(), Expert(source="org/code")), experts_per_token=1)
    text = card(recipe=recipe).text
    written = text.partition("```yaml\n")[2].partition("```")[0]
    assert MoeRecipe.from_dict(yaml.safe_load(written)) == recipe


def test_nobody_learns_where_files_were(tmp_path):
    (tmp_path / "secret" / "tune").mkdir(parents=True)
    (tmp_path / "secret" / "text.txt").write_text("words")
    expert = Expert(
        source=Origin(model=str(tmp_path / "secret" / "tune")),
        dataset=Dataset(path=str(tmp_path / "secret" / "text.txt")),
    )
    text = card(recipe=MoeRecipe(base_model="org/base", experts=(Expert(), expert))).text
    assert "secret" not in text
    assert "model: tune" in text
    assert "path: text.txt" in text


@pytest.mark.parametrize("prompt", ["x" * 10_000, "a\tb", "several\nlines"])
def test_prompts_of_any_kind_are_kept(prompt):
    recipe = MoeRecipe(base_model="org/base", experts=(Expert(positive_prompts=(prompt,)), Expert()))
    written = card(recipe=recipe).text.partition("```yaml\n")[2].partition("\n```")[0]
    assert yaml.safe_load(written)["experts"][0]["positive_prompts"] == [prompt]
