"""Run a subcommand: the one place that imports the package, once the command line has been parsed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

WORK = "transformers_moe_offload.cli"
"""The package with a module for each subcommand."""


class Subcommand(TyperCommand):
    """A command whose errors are one line each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; errors about values are shown without the prefix of Typer's validator."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command; its arguments have been parsed and checked."""
        failures = importlib.import_module(f"{WORK}.failures")
        with failures.one_line_errors(self):
            return super().invoke(ctx)


def carried_out(declared: Callable[..., None]) -> Callable[..., None]:
    """A command with the signature and the help of `declared`, which calls the function of its name in `WORK`."""

    @functools.wraps(declared)
    def command(**arguments: Any) -> None:
        work = importlib.import_module(f"{WORK}.{declared.__name__}")
        getattr(work, declared.__name__)(**arguments)

    return command
