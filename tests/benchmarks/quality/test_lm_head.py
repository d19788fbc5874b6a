"""A head of its own is the same model as the tied one, and fewer bits of it are smaller and worse."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def lm_head(script):
    return script("quality.lm_head")


def test_every_head_has_a_row_and_fewer_bits_are_smaller_and_worse(lm_head, one_thread, texts, tmp_path):
    lm_head.measure_heads(quick=True, text=texts, results=tmp_path)
    (path,) = tmp_path.glob("lm-head-*.json")
    rows, page = json.loads(path.read_text())["rows"], path.with_suffix(".md").read_text()
    assert len(rows) == len(lm_head.BESIDE) * len(lm_head.HEADS)
    for attention, experts in lm_head.BESIDE:
        by_head = {row["lm_head"]: row for row in rows if (row["attention"], row["experts"]) == (attention, experts)}
        sizes = [by_head[head]["bytes"] for head in lm_head.HEADS]
        assert sizes == sorted(sizes, reverse=True)
        assert by_head["8x64"]["perplexity"]["all"] < by_head["2x64"]["perplexity"]["all"]
        assert all(f"| {attention} / {experts} / {head} |" in page for head in lm_head.HEADS)


def test_the_copy_with_a_head_of_its_own_has_the_logits_of_the_model(lm_head, tmp_path):
    folder = lm_head.untied(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(one)(input_ids=ids).logits for one in (folder, lm_head.TINY_MOE)
        )
    assert torch.equal(found, expected)
