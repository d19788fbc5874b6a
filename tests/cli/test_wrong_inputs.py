"""Every subcommand once with an input that is wrong: one clear error, the exit code of one, and no traceback.

`tox -e users` does the same with the command that a wheel installs, without extras.
"""

import sys

import huggingface_hub
import pytest
from typer.testing import CliRunner

from moe_offload_cli.main import SUBCOMMANDS, app

from .wrong_inputs import CASES, expect_refusal, fill

EXTRAS = ("matplotlib", "matplotlib.figure", "pandas", "pyarrow", "datasets")
"""What a wheel does not bring unless it is asked to: an error that names an extra would hide the one of the input."""


@pytest.mark.parametrize(("command", "message"), CASES, ids=lambda text: text[:40])
def test_a_wrong_input_is_one_clear_error(command, message, tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    for extra in EXTRAS:
        monkeypatch.setitem(sys.modules, extra, None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    there = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, command.split(), env={"COLUMNS": "400"})
    expect_refusal(done.exit_code, done.stderr, message)
    assert sorted(tmp_path.rglob("*")) == there, "it has written something"


def test_every_subcommand_has_been_given_a_wrong_input():
    tried = {command.partition(" ")[0] for command, _ in CASES}
    assert tried == {declared.__name__ for declared in SUBCOMMANDS}
