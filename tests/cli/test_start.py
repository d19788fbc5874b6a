"""What needs no model is answered before torch is imported: help, the version, a misspelt option, completion."""

import importlib
import inspect
import json
import os
import resource
import subprocess
import sys
import typing

import pytest

from moe_offload_cli.main import SUBCOMMANDS
from transformers_moe_offload import __version__, cli

MOST_CPU_SECONDS = 0.5
TRIES = 8
"""The best of them counts, and the first that is good enough: on a busy machine the same work takes more of them."""

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
    """The finished process, which has imported nothing heavy, and the seconds of CPU that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *_, heavy = done.stderr.splitlines()
    assert json.loads(heavy) == []
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [("--help",), ("quantize", "--help")], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    done, _ = start(*arguments)
    assert done.returncode == 0
    assert "Usage: moe-offload" in done.stdout


def test_the_version_is_that_of_the_package():
    done, _ = start("--version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_on_the_command_line_imports_nothing_heavy(arguments):
    done, _ = start(*arguments)
    assert done.returncode == 2
    assert "Usage: moe-offload" in done.stderr
    assert "Traceback" not in done.stderr


def test_completion_knows_subcommands_and_options():
    asked = {"COMP_WORDS": "moe-offload q", "COMP_CWORD": "1", "_MOE_OFFLOAD_COMPLETE": "complete_bash"}
    assert start(**asked)[0].stdout.split() == ["quantize"]
    options = asked | {"COMP_WORDS": "moe-offload plan --cache", "COMP_CWORD": "2"}
    assert start(**options)[0].stdout.split() == ["--cache-budget"]


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("plan",)], ids=" ".join)
def test_an_answer_without_a_model_takes_less_than_half_a_second(arguments):
    spent = []
    while len(spent) < TRIES and (not spent or min(spent) >= MOST_CPU_SECONDS):
        spent.append(start(*arguments)[1])
    assert min(spent) < MOST_CPU_SECONDS, spent


@pytest.mark.parametrize("declared", SUBCOMMANDS, ids=lambda command: command.__name__)
def test_what_is_declared_is_what_is_carried_out(declared):
    work = getattr(importlib.import_module(f"{cli.__name__}.{declared.__name__}"), declared.__name__)
    assert sorted(parameters(work)) == sorted(inspect.signature(declared).parameters)


def parameters(function):
    """Names of parameters, with those of a dictionary that the rest is collected in."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            (rest,) = typing.get_args(typing.get_type_hints(function)[name])
            yield from typing.get_type_hints(rest)
        else:
            yield name
