"""Several gates scored on held-out text: what is counted, and what is left as it was."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_moe_offload.builder import build_moe
from transformers_moe_offload.builder.recipe import Expert, Gate, MoeRecipe, Origin
from transformers_moe_offload.builder.sources.model_class import names_in_memory
from transformers_moe_offload.builder.sweep import sweep_gates
from transformers_moe_offload.builder.sweep.routers import Routers
from transformers_moe_offload.builder.sweep.scoring import held_out, score
from transformers_moe_offload.errors import CheckpointError, RecipeError


@pytest.fixture(scope="module")
def recipe(tiny_dense, domains):
    base = str(tiny_dense)
    experts = [
        Expert(name=name, source=Origin(model=base, adapter=f"{base}-{name}"), positive_prompts=(text[:4000],))
        for name, text in domains.items()
    ]
    return MoeRecipe(base_model=Origin(model=base), experts=tuple(experts), experts_per_token=1)


@pytest.fixture(scope="module")
def texts(domains):
    return {name: [text[4000:7000]] for name, text in domains.items()}


def rows_of(model):
    name = names_in_memory(model.config)["model.layers.0.block_sparse_moe.gate.weight"]
    return model.get_parameter(name).detach().clone()


def test_bits_per_byte_are_those_of_the_model(tiny_dense, tokenizer, texts):
    model = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32).eval()
    text = texts["c"][0][:600]
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
    with torch.no_grad():
        log_odds = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
    expected = -log_odds.sum().item() / math.log(2) / len(text.encode())

    scored = score(model, held_out([text], tokenizer, length=512))

    assert scored.bits_per_byte == pytest.approx(expected, rel=1e-4)
    assert scored.tokens == tokens.shape[1] - 1
    # In windows of 50 each token has less before it, so that the same bytes take more bits.
    windows = score(model, held_out([text], tokenizer, length=50))
    assert (windows.nbytes, windows.tokens) == (scored.nbytes, scored.tokens)
    assert windows.bits > scored.bits


def test_a_sweep_finds_the_gate_that_routes(recipe, texts):
    gates = {"ridge": Gate(), "first only": Gate(mode="base_first", scale=100.0), "equal": Gate(mode="gateless")}
    done = []
    report = sweep_gates(
        recipe, gates, {**texts, "other": ["Neither of the three, but text nevertheless. " * 5]}, advance=done.append
    )

    assert sum(done) == 3
    ridge, first, equal = report.rows
    assert report.best.name == "ridge"
    assert list(ridge.bits_per_byte) == ["prose", "python", "c", "other"]
    assert ridge.best_layer[1] > 0.7
    assert all(share == pytest.approx(1 / 3, abs=0.02) for share in first.sent_home.values())
    assert all(value == pytest.approx(1) for value in equal.entropy.values())
    assert [line.split(" | ")[0] for line in report.as_markdown().splitlines()][2] == "| ridge"
    assert report.as_dict()["best"] == "ridge"


def test_a_mixture_that_was_built_is_swept_and_left_as_it_is(recipe, texts, tmp_path):
    build_moe(recipe, tmp_path / "mixture", advance=lambda nbytes: None)
    before = {file.name: file.read_bytes() for file in (tmp_path / "mixture").iterdir()}

    prepared = []
    report = sweep_gates(
        recipe,
        ["ridge", "noise"],
        texts,
        built=tmp_path / "mixture",
        prepare=lambda model: prepared.append(rows_of(model)),
    )

    assert len(prepared) == 2
    assert not torch.equal(*prepared), "routers have the rows of their gate when a mixture is prepared"

    assert {file.name: file.read_bytes() for file in (tmp_path / "mixture").iterdir()} == before
    # What was scored for the gate that it was built with is what it is.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", dtype=torch.float32).eval()
    text = held_out(texts["python"], AutoTokenizer.from_pretrained(tmp_path / "mixture"), length=512)
    # Rows of the checkpoint are rounded to its dtype.
    assert report.rows[0].bits_per_byte["python"] == pytest.approx(score(model, text).bits_per_byte, rel=1e-3)


def test_routers_take_as_many_experts_as_they_are_told_while_they_are(recipe, tmp_path):
    build_moe(recipe, tmp_path / "mixture", advance=lambda nbytes: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", dtype=torch.float32).eval()
    names = names_in_memory(model.config)
    found = {layer: names[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(6)}
    routers = Routers(model, found, "softmax")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        one = model(tokens).logits
        with routers.choosing(3):
            three = model(tokens).logits
        assert torch.equal(model(tokens).logits, one)
    assert not torch.equal(one, three)
    with pytest.raises(RecipeError, match=r"rows \[3, 192\], but the gate gives \[2, 192\]"):
        routers.set_rows({layer: torch.zeros(2, 192) for layer in range(6)})


def test_what_cannot_be_swept_says_why(recipe, texts, tokenizer, tmp_path):
    with pytest.raises(RecipeError, match="no gates to sweep"):
        sweep_gates(recipe, [], texts)
    with pytest.raises(CheckpointError, match="is no mixture that was built here"):
        sweep_gates(tmp_path, ["ridge"], texts)
    with pytest.raises(RecipeError, match="no held-out text"):
        held_out([""], tokenizer, length=8)
