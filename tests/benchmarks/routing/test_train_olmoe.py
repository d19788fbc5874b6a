"""The OLMoE for the benchmark of cache-aware routing is trained in pieces, and saved as a model that can be loaded."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LICENCE = Path(__file__).parents[3] / "LICENSE"


@pytest.fixture(scope="module")
def training(script):
    return script("routing.train_olmoe")


def test_a_run_that_is_out_of_time_keeps_what_the_next_one_needs_and_the_last_one_saves_the_model(
    training, tmp_path, one_thread, capsys
):
    licence = LICENCE.read_text()
    texts = {domain: {"held_out": [licence], "train": [licence]} for domain in ("prose", "python", "c")}
    (tmp_path / "texts.json").write_text(json.dumps(texts))

    def run(minutes):
        training.train_olmoe(quick=True, minutes=minutes, text=tmp_path / "texts.json", threads=1, made=tmp_path)
        return capsys.readouterr().out

    assert "stopped before step 0 of 2" in run(0)
    first = torch.load(tmp_path / f"{training.NAME}.training" / "state.pt", weights_only=True)
    assert first["step"] == 0
    assert "held-out perplexity" in run(60)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / training.NAME)
    assert type(model).__name__ == "OlmoeForCausalLM"
    assert not torch.equal(model.state_dict()["lm_head.weight"], first["model"]["lm_head.weight"].to(model.dtype))
    assert len(AutoTokenizer.from_pretrained(tmp_path / training.NAME)) == model.config.vocab_size
    assert "is there already" in run(60)
    assert not (tmp_path / f"{training.NAME}.training").exists()
