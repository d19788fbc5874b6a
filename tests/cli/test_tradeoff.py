"""`moe-offload tradeoff` measures strengths, recommends one, and says in one line what is wrong with its input."""

import json

import pytest

from .conftest import the_error

FEW = ("--tokens", 40, "--window", 21, "--cache-budget", "25%", "--no-mmap")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def read(path):\n    with open(path) as file:\n        return file.read()\n" * 8)
    return path


def test_it_prints_every_strength_and_a_line_of_code_and_writes_figures_and_a_picture(run, tiny_moe, text, tmp_path):
    files = ("--json", tmp_path / "f.json", "--picture", tmp_path / "p.svg", "--resume", tmp_path / "kept")
    options = ("--strengths", "0.1,0.4", "--max-loss", "10000%")
    result = run("tradeoff", tiny_moe, "--text", text, "--text", text, *FEW, *options, *files)
    assert result.exit_code == 0, result.output
    assert "40 tokens at each strength, step by step" in result.stdout
    for word in ("hit rate", "MiB a token", "tokens/s", "perplexity", "same token", "±"):
        assert word in result.stdout
    assert "recommended: strength 0.4, the largest within 10000 % of perplexity" in result.stdout
    assert "OffloadConfig(cache_budget='25%', mmap=False, cache_aware=0.4)" in result.stdout
    written = json.loads((tmp_path / "f.json").read_text())
    assert [one["strength"] for one in written["figures"]] == [0, 0.1, 0.4]
    assert written["recommended"] == 0.4
    assert written["conditions"]["packages"].keys() >= {"torch", "transformers"}
    assert "<svg" in (tmp_path / "p.svg").read_text()
    again = run("tradeoff", tiny_moe, "--text", text, "--text", text, *FEW, *options, *files)
    assert again.stdout == result.stdout, "nothing is measured again"


def test_a_cold_page_cache_and_a_loss_that_no_strength_is_within(run, tiny_moe, text):
    options = ("--strengths", "1", "--max-loss", "0", "--protect", 0, "--cold")
    result = run("tradeoff", tiny_moe, "--text", text, *FEW, *options)
    assert result.exit_code == 0, result.output
    assert ("recommended: none of these strengths; all lose more than 0 %" in result.stdout) or (
        "recommended: strength 1, the largest within 0 % of perplexity: -" in result.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strengths", "0.1,much"), "--strengths '0.1,much' is not a list of numbers such as 0.1,0.2,0.4"),
        (("--strengths", "0.1,-1"), "strength=-1.0 of cache_aware is not a number from 0"),
        (("--strengths", "9"), "strength=9.0 of cache_aware is not a number from 0"),
        (("--max-loss", "little"), "--max-loss 'little' is not a share of the perplexity such as 1%"),
        (("--protect", 4), "protect 3 or fewer"),
        (("--picture", "plot.gif"), "is neither .svg nor .png"),
        (("--json", "nowhere/f.json"), "is in nowhere, which is not a folder"),
        (("--text", "nowhere.txt"), "cannot read --text nowhere.txt"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run, tiny_moe, text, arguments, message):
    assert message in the_error(run("tradeoff", tiny_moe, "--text", text, *FEW, *arguments))


@pytest.mark.parametrize(("content", "count"), [("", "0 tokens"), ("a", "1 token")])
def test_a_text_that_is_empty_or_too_short_is_named(run, tiny_moe, tmp_path, content, count):
    path = tmp_path / "short.txt"
    path.write_text(content)
    assert f"short.txt has {count}, and nothing to predict in fewer than 2; name a longer text" in the_error(
        run("tradeoff", tiny_moe, "--text", path)
    )
