"""Report an error in one line on stderr and exit with code 2, the code of a misspelt option.

Only for errors that are meant for the user, and errors of the operating system (a full disk, a name that is too long).
Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.untrusted import system_words

EXIT_CODE = 2

_ARGUMENT = re.compile(
    r"(?<![\w.])(?<!\w\()"  # not inside of a call that is spelt out, such as HqqFormat(nbits=4)
    r"(?P<config>(?:OffloadConfig|ExpertFormats)\.)?(?P<name>\w+)"
    r"""(?:=(?P<value>'[^']*'|"[^"]*"|-?\w+(?:\.\w+)*))?"""
)

_TYPED_AS = {"predictor": "prefetch", "model": "source", "output": "folder", "cache_budget": "ram"}
"""Arguments and fields of configs that have another name on the command line."""
_FORMAT = re.compile(r"HqqFormat\(nbits=(\d), group_size=(\d+)\)")


class CommandError(MoeOffloadError):
    """The command cannot do what its arguments ask for; the message says why."""


@contextmanager
def one_line_errors(command: Any) -> Iterator[None]:
    """End the command with one line when the block raises an error of ours or of the operating system.

    Inside the block the Hub's client does not log its retries; if they all fail, the last failure is the error.
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    if level == logging.WARNING:  # otherwise HF_HUB_VERBOSITY was set
        hub.setLevel(logging.ERROR)
    try:
        yield
    except BrokenPipeError:  # the reader of the output has closed it; Typer handles that
        raise
    except (MoeOffloadError, OSError) as error:
        report(error, command)
        raise typer.Exit(EXIT_CODE) from None
    finally:
        hub.setLevel(level)


def expect_utf8(text: str | None, what: str) -> None:
    """Raise `CommandError` for text from bytes that are not valid UTF-8; tokenizers do not take it."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise CommandError(f"{what} is not valid UTF-8 after {error.start} characters; convert it") from error


def report(error: MoeOffloadError | OSError, command: Any) -> None:
    """Print an error as one line on stderr, with the option names of the command (Typer's) that it ended."""
    said = system_words(error, "") if isinstance(error, OSError) else str(error)
    typer.echo(f"error: {in_option_names(' '.join(said.split()), command)}", err=True)


def in_option_names(message: str, command: Any) -> str:
    """An error message for Python, rewritten for the command line.

    An argument or a field of a config becomes the command's option for it: `overwrite=True` becomes `--overwrite`,
    `resume=False` becomes `--no-resume`, `OffloadConfig.cache_budget` becomes `--cache-budget`, `output='moe'` becomes
    `DST moe`. Those without an option stay as they are; advice that applies in Python only is left out.
    """
    typed = {one.name: one for one in command.params}

    def as_typed(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        option = typed.get(_TYPED_AS.get(name, name)) or typed.get(name)
        if option is None or (value is None and not found["config"]):
            return found[0]
        if option.param_type_name == "argument":
            return f"{option.metavar} {value[1:-1]}" if value and value[0] in "'\"" else found[0]
        if option.is_flag and value == "False":
            return option.secondary_opts[0] if option.secondary_opts else found[0]
        return option.opts[0] if option.is_flag or value is None else f"{option.opts[0]} {value}"

    return _ARGUMENT.sub(as_typed, _FORMAT.sub(r"\1x\2", message)).replace(" or register your own", "")
