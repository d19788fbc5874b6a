"""Messages name what the caller can change: options for callers of the command, arguments for callers from Python."""

import pytest
import typer

from moe_offload_cli.main import app
from transformers_moe_offload.cli.failures import in_option_names

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("quantize", "pass overwrite=True to replace it", "pass --overwrite to replace it"),
        ("build", "or start anew with resume=False.", "or start anew with --no-resume."),
        ("chat", "set OffloadConfig.cache_budget to 8 or more", "set --cache-budget to 8 or more"),
        ("bench", "mmap=True, but they cannot be mapped", "--mmap, but they cannot be mapped"),
        ("plan", "cache_budget='lots' is not a budget", "--cache-budget 'lots' is not a budget"),
        ("chat", "(use top_p=0.5)", "(use --top-p 0.5)"),
        ("plan", "leave OffloadConfig.experts out", "leave --experts out"),
        ("plan", "ExpertFormats.layers names layer 9", "--layers names layer 9"),
        ("chat", "choose one of ['lru'] or register your own; did", "choose one of ['lru']; did"),
        ("replay", "write json_file=None", "write --json None"),
        ("quantize", "output='moe/out' and model='moe' lie", "DST moe/out and SRC moe lie"),
        ("quantize", "say how: experts=HqqFormat(nbits=4, group_size=64)", "say how: --experts 4x64"),
        ("trace", "output='t.npz' is a folder", "--output 't.npz' is a folder"),
    ],
)
def test_an_argument_is_named_as_the_option_it_is_here(command, message, expected):
    assert in_option_names(message, COMMANDS[command]) == expected


@pytest.mark.parametrize(
    "message",
    [
        "set OffloadConfig.host_budget to 8 bytes or more",  # there is no such option
        "OffloadConfig(cache_budget=8) would do",  # this is about Python
        "leave the policy as it is",  # a word
        "private=False",  # nothing says so on the command line
        "the recipe has source=1",  # an argument that is not named
    ],
)
def test_what_is_no_option_here_stays_as_it_is(message):
    assert in_option_names(message, COMMANDS["quantize"]) == message
