"""From experts and their texts to the rows of every router, on the small trained model."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from transformers_moe_offload.builder.gates import (
    RidgeStatistics,
    add_expert_gate,
    drop_expert_gate,
    program_gates,
    program_several,
)
from transformers_moe_offload.builder.recipe import Dataset, Expert, Gate
from transformers_moe_offload.builder.recipe.routers import GATE_MODES
from transformers_moe_offload.errors import CheckpointError, RecipeError


@pytest.fixture
def experts(domains):
    return [Expert(name=name, positive_prompts=(text[:4000],)) for name, text in domains.items()]


@pytest.fixture
def program(base, tokenizer, ffn):
    def program(gate, experts, **options):
        return program_gates(gate, experts, base, tokenizer, ffn, advance=lambda layers: None, **options)

    return program


@pytest.mark.parametrize("mode", GATE_MODES)
def test_every_mode_gives_every_router_its_rows(mode, program, experts, ffn):
    gates = program(Gate(mode=mode), experts)
    assert sorted(gates.rows) == list(ffn)
    assert all(rows.shape == (3, 192) and rows.dtype == torch.float32 for rows in gates.rows.values())
    assert [report.layer for report in gates.report.layers] == list(ffn)
    assert gates.report.experts == ("prose", "python", "c")
    again = program(Gate(mode=mode), experts)
    assert all(torch.equal(gates.rows[layer], again.rows[layer]) for layer in gates.rows)


def test_ridge_sends_most_tokens_home_at_the_entropy_that_was_asked_for(program, experts):
    gates = program(Gate(target_entropy=0.6), experts)
    for report in gates.report.layers:
        assert report.entropy == pytest.approx(0.6, abs=1e-3)
        assert min(report.sent_home) > 0.5
    assert min(gates.report.tokens) > 1000
    assert json.loads(json.dumps(gates.report.as_dict()))["layers"][2]["layer"] == 2


def test_a_number_scales_the_rows_as_they_are(program, experts):
    one, eight = (program(Gate(scale=scale), experts).rows[2] for scale in (1.0, 8.0))
    torch.testing.assert_close(eight, one * 8)


def test_routers_that_score_with_a_sigmoid_are_calibrated_for_it(program, experts):
    softmax, sigmoid = (program(Gate(), experts, scores=scores) for scores in ("softmax", "sigmoid"))
    assert all(report.entropy == pytest.approx(0.7, abs=1e-3) for report in sigmoid.report.layers)
    assert softmax.report.layers[0].scale != sigmoid.report.layers[0].scale


def test_several_gates_in_one_pass_are_what_they_are_alone(base, tokenizer, ffn, experts, program):
    gates = {
        "ridge": Gate(),
        "as mergekit reads": Gate(mode="mean", site="layer_input"),
        "gateless": Gate(mode="gateless"),
        "mergekit": Gate(mode="hidden", scoring="mergekit"),
    }
    passes = []
    several = program_several(gates, experts, base, tokenizer, ffn, advance=passes.append)
    assert list(several) == list(gates)
    for name, gate in gates.items():
        alone = program(gate, experts)
        assert all(torch.equal(several[name].rows[layer], alone.rows[layer]) for layer in ffn), name
    assert sum(passes) == 2 * len(ffn), "one pass for ours, one in bfloat16 for mergekit's"
    # Drawn rows are reported on as well, as hidden states are there.
    assert several["gateless"].report.layers[0].entropy == pytest.approx(1)


def test_what_is_drawn_needs_no_text_and_no_pass(program, base):
    passes = []
    gates = program_gates(
        Gate(mode="random"),
        [Expert(name="a"), Expert(name="b")],
        base,
        None,
        {2: "model.layers.2.mlp"},
        advance=passes.append,
    )
    assert passes == []
    assert list(gates.rows) == [2]


def test_the_first_expert_comes_first_for_nearly_every_token(program, experts):
    for given in (experts, [Expert(name=expert.name) for expert in experts]):
        gates = program(Gate(mode="base_first"), given)
        assert all(report.sent_home[0] > 0.97 for report in gates.report.layers)


def test_an_expert_added_later_gives_the_gates_of_all_at_once(program, experts, base, tokenizer, ffn, tmp_path):
    experts[2] = replace(experts[2], negative_prompts=("The name of the file is not what it says, and that is all.",))
    together = program(Gate(), experts, statistics=tmp_path / "together.safetensors")
    two = program(Gate(), experts[:2], statistics=tmp_path / "two.safetensors")

    added = add_expert_gate(
        two.statistics, experts[2], base, tokenizer, ffn, tmp_path / "three.safetensors", advance=lambda layers: None
    )

    assert added.report.experts == together.report.experts
    assert added.report.tokens == together.report.tokens
    for layer, rows in together.rows.items():
        torch.testing.assert_close(added.rows[layer], rows, rtol=1e-3, atol=1e-3 * rows.abs().max().item())
    assert added.statistics.about == together.statistics.about

    # And again, from the file that adding has written.
    dropped = drop_expert_gate(added.statistics, 0, tmp_path / "dropped.safetensors")
    assert dropped.report.experts == ("python", "c")
    for report in dropped.report.layers:
        assert report.entropy == pytest.approx(0.7, abs=1e-3)
        assert min(report.sent_home) > 0.5
    with pytest.raises(RecipeError, match="cannot drop expert 5 of 3"):
        drop_expert_gate(added.statistics, 5, tmp_path / "no.safetensors")


def test_an_expert_is_not_added_to_another_model(program, experts, base, tokenizer, tmp_path):
    gates = program(Gate(), experts[:2], statistics=tmp_path / "two.safetensors")
    with pytest.raises(RecipeError, match=r"layers \[0, 1, 2\] .* experts in layers \[1\]"):
        add_expert_gate(
            gates.statistics, experts[2], base, tokenizer, {1: "model.layers.1.mlp"}, tmp_path / "x.safetensors"
        )


def test_a_file_that_holds_no_statistics_is_refused(tmp_path, tiny_dense):
    with pytest.raises(CheckpointError, match="holds no gate statistics"):
        RidgeStatistics(tiny_dense / "model.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot read gate statistics"):
        RidgeStatistics(broken)
    with pytest.raises(CheckpointError, match="cannot read gate statistics"):
        RidgeStatistics(tmp_path / "absent.safetensors")


def test_statistics_are_whole_or_not_there(program, experts, tmp_path, monkeypatch):
    from transformers_moe_offload.builder.gates.statistics import StatisticsWriter

    def full(*_):
        raise CheckpointError("disk full")

    monkeypatch.setattr(StatisticsWriter, "write", full)
    with pytest.raises(CheckpointError, match="disk full"):
        program(Gate(), experts, statistics=tmp_path / "gates.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_only_ridge_has_statistics(program, experts, tmp_path):
    with pytest.raises(RecipeError, match="'mean' has no statistics to keep"):
        program(Gate(mode="mean"), experts, statistics=tmp_path / "x.safetensors")


def test_experts_without_text_and_with_the_same_text_are_refused(program, experts):
    with pytest.raises(RecipeError, match=r"'ridge' reads text, but expert 'd' has neither"):
        program(Gate(), [*experts, Expert(name="d")])
    with pytest.raises(RecipeError, match=r"'prose' and 'copy' have the same texts"):
        program(Gate(mode="mean"), [*experts, replace(experts[0], name="copy")])
    with pytest.raises(RecipeError, match=r"'mean' reads text, but expert 'd' has neither"):
        program(Gate(mode="mean"), [*experts, Expert(name="d", positive_prompts=("",))])


def test_degenerate_gates_are_refused_with_their_layers(program, experts):
    # Texts that are not the same but say the same: their hidden states do not differ at all.
    twice = replace(experts[0], name="twice", positive_prompts=experts[0].positive_prompts * 2)
    for mode in ("mean", "ridge"):
        with pytest.raises(RecipeError, match=r"gates of layers 0, 1, 2 cannot tell some experts apart \(condition"):
            program(Gate(mode=mode), [*experts, twice])
    cancelled = replace(experts[0], negative_prompts=experts[0].positive_prompts)
    with pytest.raises(RecipeError, match=r"gate of expert 'prose' in layer 0 comes out as zero: its negative_prompts"):
        program(Gate(mode="mean", center=False), [cancelled, *experts[1:]])


def test_texts_that_hardly_differ_are_warned_of(program, experts, caplog):
    nearly = replace(experts[0], name="nearly", positive_prompts=(experts[0].positive_prompts[0] + " And one more.",))
    with caplog.at_level(logging.WARNING):
        program(Gate(mode="mean"), [*experts, nearly])
    assert "hardly tell some experts apart (condition number up to" in caplog.text


def test_few_tokens_are_warned_of(program, experts, caplog):
    with caplog.at_level(logging.WARNING):
        program(Gate(), [*experts[:2], Expert(name="d", positive_prompts=("int main(void);",))])
    assert "Expert 'd' has" in caplog.text
    assert "'prose' has" not in caplog.text


def test_text_may_come_from_files(program, experts, domains, tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text(domains["prose"][:4000])
    from_file = Expert(name="prose", dataset=Dataset(path=str(text)))
    gates, expected = (program(Gate(), [first, *experts[1:]]) for first in (from_file, experts[0]))
    assert gates.report.tokens == expected.report.tokens
    assert all(torch.equal(gates.rows[layer], expected.rows[layer]) for layer in gates.rows)

    few = program(Gate(), [replace(from_file, dataset=Dataset(path=str(text), max_tokens=100)), *experts[1:]])
    assert few.report.tokens[0] == 99, "the first token is not counted"


def test_one_expert_needs_no_gate(program, experts):
    gates = program(Gate(mode="gateless"), experts[:1])
    assert gates.report.layers[0].condition == 1.0
    with pytest.raises(RecipeError, match="one expert"):
        program(Gate(), experts[:1])
