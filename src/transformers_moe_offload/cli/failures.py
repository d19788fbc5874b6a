"""Say what went wrong in one line on stderr and leave with exit code 2, the code that also a misspelt option has.

Only errors that are meant for the user are treated so; anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from transformers_moe_offload.errors import MoeOffloadError

EXIT_CODE = 2


class CommandError(MoeOffloadError):
    """What the command line asks for cannot be done, with the reason."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line when an error of ours comes out of the block."""
    try:
        yield
    except MoeOffloadError as error:
        report(error)
        raise typer.Exit(EXIT_CODE) from None


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Make the errors with which Transformers answers a bad id, a bad file or a bad option ours; `what` begins them."""
    try:
        yield
    except MoeOffloadError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"{what}: {error}") from error


def report(error: MoeOffloadError) -> None:
    """Print an error as one line on stderr."""
    typer.echo(f"error: {_in_option_names(' '.join(str(error).split()))}", err=True)


def _in_option_names(message: str) -> str:
    """Name options as they are written on the command line: `OffloadConfig.cache_budget` is `--cache-budget` here."""
    return re.sub(r"OffloadConfig\.(\w+)", lambda match: "--" + match[1].replace("_", "-"), message)
