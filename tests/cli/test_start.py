"""What needs no model is answered before torch is imported: help, the version, a misspelt option, completion."""

import importlib
import inspect
import json
import os
import resource
import subprocess
import sys

import pytest

from moe_offload_cli.main import SUBCOMMANDS
from transformers_moe_offload import __version__, cli

MOST_CPU_SECONDS = 0.5
TRIES = 3
"""The best of them counts: a machine that is busy spends more on the same work."""

HEAVY = ("torch", "transformers", "transformers_moe_offload", "numpy", "accelerate", "huggingface_hub", "safetensors")

PROGRAM = f"""
import json, sys
from moe_offload_cli.main import app
try:
    app(prog_name="moe-offload")
finally:
    print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)
"""

MISTAKES = [("nonsense",), ("plan",), ("chat", "model", "--nonsense"), ("trace", "model", "-o", "t", "--seed", "x")]


def start(*arguments, **environment):
    """The finished process, and the seconds of CPU that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def assert_is_quick(*arguments, **environment):
    """The finished process, after so many tries as it took."""
    spent = []
    while len(spent) < TRIES and (not spent or min(spent) >= MOST_CPU_SECONDS):
        done, seconds = start(*arguments, **environment)
        spent.append(seconds)
    assert min(spent) < MOST_CPU_SECONDS, spent
    *_, heavy = done.stderr.splitlines()
    assert json.loads(heavy) == []
    return done


@pytest.mark.parametrize("arguments", [("--help",), ("quantize", "--help")], ids=" ".join)
def test_help_comes_at_once(arguments):
    done = assert_is_quick(*arguments)
    assert done.returncode == 0
    assert "Usage: moe-offload" in done.stdout


def test_the_version_comes_at_once():
    done = assert_is_quick("--version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_on_the_command_line_is_told_at_once(arguments):
    done = assert_is_quick(*arguments)
    assert done.returncode == 2
    assert "Usage: moe-offload" in done.stderr
    assert "Traceback" not in done.stderr


def test_completion_comes_at_once():
    asked = {"COMP_WORDS": "moe-offload q", "COMP_CWORD": "1", "_MOE_OFFLOAD_COMPLETE": "complete_bash"}
    assert assert_is_quick(**asked).stdout.split() == ["quantize"]
    options = asked | {"COMP_WORDS": "moe-offload plan --cache", "COMP_CWORD": "2"}
    assert assert_is_quick(**options).stdout.split() == ["--cache-budget"]


@pytest.mark.parametrize("declared", SUBCOMMANDS, ids=lambda command: command.__name__)
def test_what_is_declared_is_what_is_carried_out(declared):
    work = getattr(importlib.import_module(f"{cli.__name__}.{declared.__name__}"), declared.__name__)
    assert list(inspect.signature(work).parameters) == list(inspect.signature(declared).parameters)
