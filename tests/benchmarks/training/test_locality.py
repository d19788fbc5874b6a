"""Routers are trained for locality, and what came of it is held against what was predicted."""

import pytest
import torch
from safetensors.torch import save_file


def test_a_row_trains_and_counts_hits_and_losses(script, tiny_moe, tmp_path, one_thread):
    tokens = torch.randint(3, 4096, (7, 16), generator=torch.Generator().manual_seed(0))
    save_file({"trained": tokens[:4].clone(), "held_out": tokens[4:].clone()}, tmp_path / "windows.safetensors")
    work = script("training.locality_row").locality_row
    job = {"folder": tiny_moe, "text": str(tmp_path / "windows.safetensors"), "steps": 2, "batch": 2, "stepwise": 8}
    untouched, trained = (work(**job, **row) for row in ({"is_trained": False}, {"locality": 50.0}))
    assert len(untouched["losses"]) == len(trained["losses"]) == 3
    assert untouched["losses"] != trained["losses"]
    assert 0 < untouched["hit_rate"] < 1
    assert trained["mib_per_token"] > 0


def row(losses, hit_rate):
    figures = {"mib_per_token": 1.0, "repeat_rate": 0.4, "load_cv": 0.2, "stepwise_loss": 3.0}
    return figures | {"losses": losses, "hit_rate": hit_rate}


@pytest.mark.parametrize(
    ("losses", "hits", "is_kept"), [([3.0, 3.01], 0.5, True), ([3.0, 3.03], 0.5, False), ([3.0, 3.0], 0.3, False)]
)
def test_a_prediction_is_about_hits_and_perplexity(script, losses, hits, is_kept):
    locality = script("training.locality")
    result = {"rows": {locality.WITHOUT: row([3.0, 3.0], 0.35), locality.WITH: row(losses, hits)}}
    assert locality.verdict(result)[1] == is_kept
    (table,) = locality.tables(result)
    assert [line[1] for line in table.rows] == ["35.0%", f"{hits:.1%}"]
    assert locality.verdict({"rows": {}})[1] is None
