"""A mixture of adapters becomes one of dense blocks that says the same, or an error says why it cannot."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from models.mixtures import TOKENS, load, logits, mixture, saved, write_adapter
from transformers_moe_offload import CheckpointError, OffloadConfig, RecipeError
from transformers_moe_offload.builder import MoeRecipe, bake_adapters, build_adapter_moe, build_moe
from transformers_moe_offload.builder.recipe import Expert, Gate, Origin
from transformers_moe_offload.models.adapter_moe import AdapterMoeConfig, AdapterMoeForCausalLM

MODELS = Path(__file__).parents[3] / "examples" / "models"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / "wide", 1, rank=8),
        write_adapter(folder / "narrow", 2, rank=2, use_rslora=True),
        write_adapter(folder / "some", 3, targets=["up_proj"], alpha_pattern={"up_proj": 5}),
    ]


@pytest.mark.parametrize(
    "options", [{}, {"num_experts_per_tok": 1}, {"temperature": 0.3}, {"num_experts_per_tok": 3, "temperature": 2.0}]
)
def test_what_is_baked_says_what_the_mixture_says(options, adapters, tmp_path):
    kept = saved(mixture(adapters, rank=8, **options), tmp_path / "kept")
    info = bake_adapters(kept, tmp_path / "baked")
    assert info.experts == ("wide", "narrow", "some")
    assert (info.gates.mode, info.experts_per_token) == ("baked", options.get("num_experts_per_tok", 2))
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    torch.testing.assert_close(logits(baked), logits(load(kept)), rtol=0, atol=1e-5)
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", moe_offload=OffloadConfig())
    torch.testing.assert_close(logits(offloaded), logits(baked), rtol=0, atol=1e-5)


def test_other_families_have_containers_of_their_own(adapters, tmp_path):
    dense = Qwen3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    config = AdapterMoeConfig(text_config=dense.to_dict(), adapters=[folder.name for folder in adapters], rank=8)
    config.adapter_folders = [str(folder) for folder in adapters]
    torch.manual_seed(0)
    model = AdapterMoeForCausalLM(config).eval()
    model.read_adapters()
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            torch.nn.init.normal_(parameter)
    kept = saved(model, tmp_path / "kept")
    assert bake_adapters(kept, tmp_path / "baked").container == "qwen3_moe"
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    torch.testing.assert_close(logits(baked), logits(model), rtol=0, atol=1e-5)


def test_trained_routers_and_adapters_are_baked_as_they_are(adapters, tmp_path):
    model = mixture(adapters, rank=8)
    before = logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    kept = saved(model, tmp_path / "kept")
    bake_adapters(kept, tmp_path / "baked")
    baked = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "baked"))
    torch.testing.assert_close(baked, logits(model), rtol=0, atol=1e-5)
    assert (baked - before).abs().max() > 1e-2


def test_the_card_and_the_recipe_say_where_routers_are_from(tmp_path):
    experts = tuple(
        Expert(name=name, source=Origin(adapter=str(MODELS / f"tiny-dense-{name}"))) for name in ("c", "python")
    )
    given = MoeRecipe(
        kind="adapter_moe", base_model=Origin(model=str(MODELS / "tiny-dense")), experts=experts,
        experts_per_token=1, gate=Gate(mode="random"), dtype="float32",
    )  # fmt: skip
    build_adapter_moe(given, tmp_path / "kept")
    info = bake_adapters(tmp_path / "kept", tmp_path / "baked", dtype="bfloat16")
    card = (tmp_path / "baked" / "README.md").read_text()
    assert "Those of the mixture of adapters" in card
    assert str(tmp_path) not in card
    assert info.dtype == "bfloat16"
    assert [one.name for one in info.sources] == ["kept", "c", "python"]
    assert (tmp_path / "baked" / "tokenizer.json").read_bytes() == (MODELS / "tiny-dense/tokenizer.json").read_bytes()
    with pytest.raises(Exception, match="holds a complete checkpoint"):
        bake_adapters(tmp_path / "kept", tmp_path / "baked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_per": "linear"}, "router_per='linear', and routers of dense blocks work like router_per='ffn'"),
        ({"router_per": "model"}, "router_per='model'"),
        ({"scoring": "sigmoid"}, "scoring='sigmoid', and routers of dense blocks work like scoring='softmax'"),
        ({"scoring": "arrow"}, "scoring='arrow'"),
        ({"scoring": "uniform"}, "scoring='uniform'"),
    ],
)
def test_what_chooses_in_another_way_is_refused(options, message, adapters, tmp_path):
    kept = saved(mixture(adapters, rank=8, **options), tmp_path / "kept")
    with pytest.raises(RecipeError, match=message):
        bake_adapters(kept, tmp_path / "baked")
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_adapters_on_attention_are_refused(adapters, tmp_path):
    both = write_adapter(tmp_path / "both", 4, targets=["up_proj", "q_proj"])
    kept = mixture([adapters[0], both], rank=8, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"])
    with pytest.raises(RecipeError, match=r"add to model\.layers\.0\.self_attn\.q_proj .*no feed-forward block"):
        bake_adapters(saved(kept, tmp_path / "kept"), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_other_models_containers_and_recipes_are_refused(adapters, tmp_path):
    kept = saved(mixture(adapters, rank=8), tmp_path / "kept")
    with pytest.raises(RecipeError, match="is a llama; only a mixture of adapters"):
        bake_adapters(MODELS / "tiny-dense", tmp_path / "baked")
    with pytest.raises(CheckpointError, match="cannot read the config of"):
        bake_adapters(tmp_path / "nothing", tmp_path / "baked")
    experts = tuple(Expert(source=Origin(adapter=str(MODELS / f"tiny-dense-{name}"))) for name in ("c", "python"))
    given = MoeRecipe(base_model=Origin(model=str(MODELS / "tiny-dense")), experts=experts)
    with pytest.raises(RecipeError, match="gate mode 'baked' is what bake_adapters writes"):
        build_moe(replace(given, gate=Gate(mode="baked")), tmp_path / "built")
    with pytest.raises(RecipeError, match="scores experts by sigmoid"):
        bake_adapters(kept, tmp_path / "baked", container="glm4_moe")
