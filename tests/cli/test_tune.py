"""`moe-offload tune` recommends one line of code, and says in one line what is wrong with its input."""

import json

import pytest

from .conftest import the_error

FEW = ("--tokens", 24, "--window", 13, "--policy", "lru", "--policy", "lfu", "--predictor", "last_token")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def read(path):\n    with open(path) as file:\n        return file.read()\n" * 8)
    return path


@pytest.fixture
def trace(run, tiny_moe, tmp_path):
    path = tmp_path / "trace.npz"
    prompt = ("--prompt", "def read(", "--max-new-tokens", 9)
    assert run("trace", tiny_moe, *prompt, "--cache-budget", "25%", "--output", path).exit_code == 0
    return path


def test_it_prints_what_it_compared_and_a_line_of_code_and_writes_figures(run, tiny_moe, text, tmp_path):
    options = ("--strengths", "0.3", "--formats", "4x32", "--max-loss", "10000%", "--json", tmp_path / "f.json")
    result = run("tune", tiny_moe, "--text", text, "--ram", "5MiB", *FEW, *options)
    assert result.exit_code == 0, result.output
    assert "tokens/s in 5,242,880 bytes of experts, predicted on 24 tokens of text" in result.stdout
    for word in (
        "policy",
        "prefetch",
        "format",
        "strength",
        "hit rate",
        "perplexity",
        "predicted",
        "measured",
        "off by",
    ):
        assert word in result.stdout
    assert "recommended: " in result.stdout
    assert "within 15 %" in result.stdout
    written = json.loads((tmp_path / "f.json").read_text())
    assert result.stdout.rstrip().endswith(written["line"])
    assert written["line"].startswith("OffloadConfig(cache_budget=")
    assert written["conditions"]["packages"].keys() >= {"torch", "transformers"}
    assert sum(one["measured_tokens_per_s"] is not None for one in written["candidates"]) == 3
    assert {one["config"]["policy"] for one in written["candidates"]} == {"lru", "lfu"}
    if "experts=" in written["line"] or "cache_aware=" in written["line"]:
        assert "it changes results: perplexity " in result.stdout


def test_it_tunes_for_a_trace(run, tiny_moe, trace):
    result = run("tune", tiny_moe, "--trace", trace, "--ram", "5MiB", *FEW)
    assert result.exit_code == 0, result.output
    assert "predicted on the trace" in result.stdout
    assert "note: formats of experts and strengths of cache-aware routing are left out" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ram", "1KiB"), "one slot for an expert takes"),
        (("--ram", "much"), "--ram 'much' is not a budget"),
        (("--ram", "25%"), "--ram '25%' is not a size"),
        (("--ram", "9000TiB"), "--ram '9000TiB' is 9,895,604,649,984,000 bytes, and this machine has"),
        (("--strengths", "0.1,-1"), "strength=-1.0 of cache_aware is not a number from 0"),
        (("--strengths", "some"), "--strengths 'some' is not a list of numbers such as 0.1,0.2,0.4"),
        (("--formats", "five"), "'five' is not a format; write bits and group size such as 4x64"),
        (("--max-loss", "little"), "--max-loss 'little' is not a share of the perplexity such as 1%"),
        (("--policy", "lur"), "--policy 'lur' is not a known policy"),
        (("--predictor", "oracle"), "--predictor 'oracle' is not one of"),
        (("--json", "nowhere/f.json"), "is in nowhere, which is not a folder"),
        (("--text", "nowhere.txt"), "cannot read --text nowhere.txt"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run, tiny_moe, text, arguments, message):
    ram = () if "--ram" in arguments else ("--ram", "5MiB")
    assert message in the_error(run("tune", tiny_moe, "--text", text, *ram, *arguments))


def test_the_least_ram_is_named_by_the_option(run, tiny_moe, text):
    said = the_error(run("tune", tiny_moe, "--text", text, "--ram", "1KiB"))
    assert "too small" in said
    assert "set --ram to" in said


@pytest.mark.parametrize("given", ["neither", "both"])
def test_a_text_or_a_trace_is_given_and_not_both(run, tiny_moe, text, given):
    what = () if given == "neither" else ("--text", text, "--trace", text)
    said = the_error(run("tune", tiny_moe, "--ram", "5MiB", *what))
    assert "give what to tune for either with --text FILE, as often as you like, or with --trace TRACE" in said


@pytest.mark.parametrize(("content", "count"), [("", "0 tokens"), ("a", "1 token")])
def test_a_text_that_is_empty_or_too_short_is_named(run, tiny_moe, tmp_path, content, count):
    path = tmp_path / "short.txt"
    path.write_text(content)
    said = the_error(run("tune", tiny_moe, "--text", path, "--ram", "5MiB"))
    assert f"short.txt has {count}, and nothing to predict in fewer than 2; name a longer text" in said


def test_a_trace_of_another_model_is_refused(run, fp8, trace):
    said = the_error(run("tune", fp8, "--trace", trace, "--ram", "5MiB"))
    assert "the trace was recorded with 8 sparse layers of 16 experts, and" in said


def test_a_file_that_is_no_trace_is_refused(run, tiny_moe, text):
    assert "cannot read the trace" in the_error(run("tune", tiny_moe, "--trace", text, "--ram", "5MiB"))


def test_a_dense_model_and_a_folder_without_one_are_refused(run, dense_model, text, tmp_path):
    said = the_error(run("tune", dense_model, "--text", text, "--ram", "5MiB"))
    assert "has no routed experts that can be offloaded" in said
    said = the_error(run("tune", tmp_path, "--text", text, "--ram", "5MiB"))
    assert "has no config.json" in said
