"""The card says what a checkpoint was made from and how, keeps its licence, and is one that the Hub can read."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from transformers_moe_offload import ExpertFormats, HqqFormat, OffloadConfig
from transformers_moe_offload.hf.prebuilt.card import auto_class_of, model_card
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hub.fetch import Fetched
from zoo.build import build

SIZES = Sizes(
    num_experts=6144,
    expert_weights=29 * 10**9,
    plain_expert_bytes=58 * 10**9,
    expert_bytes=12 * 10**9,
    plain_dense_bytes=3 * 10**9,
    dense_bytes=10**9,
    cache_bytes=12 * 10**9,
    smallest_budget=2 * 2**20,
)
THREE_BITS = HqqFormat(nbits=3, group_size=64)
CONFIG = OffloadConfig(experts={"default": THREE_BITS, "layers": {"0-3": HqqFormat(nbits=4)}}, dense=HqqFormat(nbits=4))
SOURCE_CARD = """---
license: other
license_name: tongyi
license_link: https://example.org/licence
language: [en, zh]
pipeline_tag: text-generation
tags: [chat]
model-index: nonsense
---
# The original
"""


@pytest.fixture
def fetched(tmp_path) -> Fetched:
    card = tmp_path / "README.md"
    card.write_text(SOURCE_CARD)
    return Fetched("Qwen/Qwen3-30B-A3B", "c0ffee", tmp_path, (), (), card)


def card_of(fetched: Fetched, **options) -> ModelCard:
    return ModelCard(model_card("me/qwen-3bit", fetched, CONFIG, SIZES, **options))


def test_the_front_matter_names_the_base_and_keeps_the_licence(fetched):
    data = card_of(fetched).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-30B-A3B"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers"
    assert (data["license"], data["license_name"]) == ("other", "tongyi")
    assert data["license_link"] == "https://example.org/licence"
    assert (data["language"], data["pipeline_tag"]) == (["en", "zh"], "text-generation")
    assert {"mixture-of-experts", "quantized", "hqq"} <= set(data["tags"])


def test_the_text_has_recipe_bits_sizes_and_two_lines_that_load_it(fetched):
    text = card_of(fetched).text
    assert "| experts | 3-bit, groups of 64 | 3.258 |" in text
    assert "| experts of sparse layers 0-3 | 4-bit, groups of 64 | 4.258 |" in text
    assert "| attention and dense MLPs | 4-bit, groups of 64 | 4.258 |" in text
    assert "The experts take 3.31 bits per weight" in text
    assert "| all 6144 experts, on disk | 11.2 GiB | 54.0 GiB |" in text
    assert "| smallest `cache_budget`, in memory | 2.0 MiB | |" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/qwen-3bit"' in text


def test_hot_experts_are_a_line_of_the_recipe(fetched):
    two, four = HqqFormat(nbits=2, group_size=16), HqqFormat(nbits=4)
    formats = ExpertFormats(default=two, hot=four, hot_experts={"0": [1, 2], "5": [0]})
    text = model_card("me/mixed", fetched, OffloadConfig(experts=formats), SIZES)
    assert "| 3 experts that are used most | 4-bit, groups of 64 | 4.258 |" in text


def test_the_code_in_the_card_runs_as_far_as_the_model_s_name(fetched, monkeypatch):
    text = card_of(fetched).text
    code = text.partition("```python\n")[2].partition("```")[0]
    asked = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: asked.append((args, options)))
    exec(compile(code, "card", "exec"), {})
    ((args, options),) = asked
    assert args == ("me/qwen-3bit",)
    assert OffloadConfig.make(options["moe_offload"]) == OffloadConfig()


def test_a_folder_is_no_base_model_unless_its_id_is_given(fetched, tmp_path):
    local = Fetched("my-folder", None, tmp_path, (), (), None)
    card = card_of(local)
    assert "base_model" not in card.data.to_dict()
    assert "my-folder, quantized with HQQ" in card.text
    assert card_of(local, base_model="me/original").data.base_model == "me/original"


@pytest.mark.parametrize("content", ["no front matter", "---\n: : :\n---\n", "---\n- a list\n---\n", "\x00"])
def test_a_source_card_that_cannot_be_read_is_done_without(fetched, content):
    Path(fetched.card).write_text(content)
    assert card_of(fetched).data.license is None


@pytest.mark.parametrize(
    ("name", "auto_class"),
    [
        ("qwen3_moe", "AutoModelForCausalLM"),
        ("qwen3_vl_moe", "AutoModelForImageTextToText"),
        ("switch_transformers", "AutoModelForSeq2SeqLM"),
    ],
)
def test_a_model_is_loaded_by_the_auto_class_for_its_kind(name, auto_class):
    assert auto_class_of(build(name)) == auto_class
