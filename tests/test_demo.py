"""The demo shows what it should, notices a wrong token, and says clearly what was wrong with its input."""

import importlib.util
from pathlib import Path

import pytest
from transformers.utils import logging

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    logging.enable_progress_bar()


def test_it_shows_the_plan_the_texts_and_the_statistics(demo, capsys):
    assert demo.main(["--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr()
    assert "32 (25%)" in shown.out
    for prompt in demo.PROMPTS.values():
        assert prompt in shown.out
    assert shown.out.count("experts asked for") == len(demo.PROMPTS)
    assert "writes the same 12 tokens" in shown.out
    assert shown.err == ""


def test_a_token_that_the_plain_model_would_not_write_is_a_failure(demo, capsys, monkeypatch):
    honest = demo.continuation

    def other_tokens_when_plain(model, *args):
        return honest(model, *args) + (not hasattr(model, "moe_offload"))

    monkeypatch.setattr(demo, "continuation", other_tokens_when_plain)
    assert demo.main(["--max-new-tokens", "1"]) == 1
    assert "other tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
        (["--model", str(DEMO.parent)], "Unrecognized model"),
        (["--model", str(DEMO.parent / "models" / "tiny-dense")], "has no routed experts that can be offloaded"),
        (["--cache-budget", "lots"], "cache_budget='lots' is not a budget"),
        (["--cache-budget", "1kB"], "set OffloadConfig.cache_budget to 110,592 bytes or more"),
        (["--max-new-tokens", "0"], "0 is not a positive number of tokens"),
        (["--max-new-tokens", "ten"], "ten is not a positive number of tokens"),
        (["--device", "gpu"], "gpu is not a device"),
        (["--modle", "x"], "unrecognized arguments"),
    ],
)
def test_a_wrong_input_is_told_and_exits_with_2(demo, capsys, arguments, message):
    try:
        status = demo.main(arguments)
    except SystemExit as leaving:  # how argparse leaves
        status = leaving.code
    assert status == 2
    assert message in capsys.readouterr().err
