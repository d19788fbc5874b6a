"""Fewer bits are worse, every recipe has its row, and the search knows nothing but what each layer costs."""

import json
from itertools import pairwise

import pytest
import typer


@pytest.fixture(scope="module")
def quality(script):
    return script("quality.quality")


@pytest.fixture(scope="module")
def written(quality, one_thread, texts, tmp_path_factory):
    """What `--quick` writes."""
    folder = tmp_path_factory.mktemp("quality")
    quality.measure_quality(quick=True, text=texts, results=folder)
    return folder


@pytest.fixture(scope="module")
def result(written):
    (path,) = written.glob("quality-*.json")
    return json.loads(path.read_text())


def test_every_format_is_measured_with_both_solvers(quality, result):
    rows = {(row["attention"], row["experts"], row["solver"]) for row in result["uniform"]}
    every = {(a, e, s) for a in quality.ATTENTION for e in quality.QUICK_EXPERTS for s in quality.SOLVERS}
    assert every - rows == {("16", "16", "nearest")}
    assert len(result["uniform"]) == len(rows)


@pytest.mark.parametrize("attention", ["16", "4x64"])
@pytest.mark.parametrize("solver", ["hqq", "nearest"])
def test_fewer_bits_are_smaller_and_worse(result, attention, solver):
    matching = [row for row in result["uniform"] if (row["attention"], row["solver"]) == (attention, solver)]
    rows = {row["experts"]: row for row in matching}
    falling = [rows[experts] for experts in ("4x32", "3x32", "2x32")]
    assert all(a["bytes"] > b["bytes"] for a, b in pairwise(falling))
    assert all(a["perplexity"]["all"] < b["perplexity"]["all"] for a, b in pairwise(falling))


def test_bits_count_scales_and_zeros(result):
    bits = {row["experts"]: row["bits_per_expert_weight"] for row in result["uniform"] + result["mixed"]}
    assert bits["16"] == 16
    assert bits["2x16"] == pytest.approx(2 + 16.5 / 16, abs=0.01)
    assert bits["3x32"] == pytest.approx(3 + 16.5 / 32, abs=0.01)


def test_mixes_keep_to_the_limit_and_say_what_each_layer_has(quality, result):
    assert all(row["bits_per_expert_weight"] <= quality.LIMIT for row in result["mixed"])
    assert "0-1: 3x32, 2-5: 2x16, 6-7: 3x32" in {row["experts"] for row in result["mixed"]}


def test_the_page_shows_every_row_and_the_plot(written, result):
    (page,) = written.glob("quality-*.md")
    text = page.read_text()
    rows = [row for row in result["uniform"] + result["mixed"] if row["solver"] == "hqq"]
    assert all(f"| {row['attention']} / {row['experts']} |" in text for row in rows)
    assert f"({page.stem}.png)" in text
    assert page.with_suffix(".png").stat().st_size > 10_000


def test_the_search_spends_bits_where_they_help_most(quality):
    rises = {"many": [0.0, 0.0, 0.0], "few": [0.1, 0.3, 0.2]}
    bits = {"many": 4.0, "few": 2.0}
    assert quality.cheapest(rises, bits, 2.0) == ("few", "few", "few")
    assert quality.cheapest(rises, bits, 3.0) == ("few", "many", "few")
    assert quality.cheapest(rises, bits, 3.4) == ("few", "many", "many")


def test_a_broken_promise_is_called_broken(quality):
    def row(bits, ratio):
        over = {"ratio": ratio, "standard_error": 0.001}
        return {
            "experts": "0-3: 3x32, 4-7: 2x32",
            "attention": "16",
            "bits_per_expert_weight": bits,
            "perplexity": {"all": 10 * ratio},
            "over_four_bits": over,
        }

    assert quality.verdict({"mixed": [row(3.2, 1.03), row(3.2, 1.019)]})[1] is True
    promise, is_kept = quality.verdict({"mixed": [row(3.2, 1.03), row(3.4, 1.001)]})
    assert is_kept is False
    assert "+3.00% ± 0.10" in promise
    assert quality.verdict({"mixed": []})[1] is None


def test_too_little_text_is_an_error_with_both_numbers(script, tmp_path):
    texts = {domain: {"held_out": ["a few words"], "train": []} for domain in ("prose", "python", "c")}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    with pytest.raises(typer.BadParameter, match=r"0 windows of 512 tokens, and 3 are asked for"):
        script("quality.held_out").load_text(tmp_path / "texts.json", held_out=3, trained=1, length=512)
