"""The same is trained with offloaded experts and plainly, and held against what is promised."""

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "windows.safetensors"
    tokens = torch.randint(3, 4096, (3, 4, 16), generator=torch.Generator().manual_seed(0))
    save_file({"trained": tokens[:2].clone(), "held_out": tokens[2].clone()}, path)
    return str(path)


@pytest.mark.parametrize("method", ["router", "lora", "chosen"])
def test_a_row_trains_the_same_plain_and_offloaded(script, tiny_moe, text, one_thread, method):
    train = script("training.finetune_row").train_row
    plain = train(tiny_moe, text, method, implementation="eager")
    offloaded = train(tiny_moe, text, method, offload={"cache_budget": "50%", "arithmetic": "exact"})
    assert offloaded["losses"] == pytest.approx(plain["losses"], abs=0.01)
    assert offloaded["held_out"] == pytest.approx(plain["held_out"], abs=0.01)
    assert offloaded["held_out"][1] != offloaded["held_out"][0]
    assert offloaded["trainable_parameters"] == plain["trainable_parameters"] > 0
    assert plain["cache"] is None
    assert offloaded["cache"]["misses"] > 0


def row(*, rss=1000, step_s=1.0, losses=(5.0, 4.0), held_out=(5.0, 4.0), cache=None):
    return {
        "trainable_parameters": 10,
        "imports_rss": 100,
        "load_rss": 500,
        "train_rss": rss,
        "step_s": [9.0, step_s, step_s],
        "losses": list(losses),
        "held_out": list(held_out),
        "cache": cache,
    }


def test_memory_and_time_are_held_against_the_plain_model(script):
    finetune = script("training.finetune")
    cache = {"hits": 3, "late_hits": 0, "misses": 1}
    result = {
        "rows": {
            finetune.PLAIN: row(),
            finetune.COPIED: row(rss=400, step_s=1.6, cache=cache),
            finetune.MAPPED: row(rss=410, step_s=1.5, cache=cache),
        }
    }
    kept = [kept for promise, kept in finetune.verdicts(result) if "offloaded" in promise]
    assert kept == [True, False, False, True]
    _, heavy = finetune.tables(result)
    assert [line[-1] for line in heavy.rows] == ["", "75%", "75%"]


def test_losses_are_held_against_the_plain_model_and_must_fall(script):
    finetune = script("training.finetune")
    result = {
        "rows": {
            "router, plain": row(),
            "router, offloaded": row(losses=(5.0, 4.02)),
            "lora, plain": row(),
            "lora, offloaded": row(held_out=(5.0, 5.0)),
        }
    }
    kept = {
        method: [kept for promise, kept in finetune.verdicts(result) if promise.startswith(f"{method}: ")]
        for method in finetune.METHODS
    }
    assert kept == {"router": [True, False], "lora": [False, False], "chosen": [None]}
    assert len(finetune.tables(result)[0].rows) == 4


def test_a_text_that_is_too_short_is_refused_with_both_numbers(script, tmp_path):
    (tmp_path / "short.txt").write_text("SELECT 1;\n" * 300)
    with pytest.raises(Exception, match=r"the text has \d+ windows of 128 tokens, and 84 are needed"):
        script("training.finetune").learnt(tmp_path, 20, 4, 4)
