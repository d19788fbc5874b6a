"""Say what went wrong in one line on stderr and leave with exit code 2, the code that also a misspelt option has.

Only errors that are meant for the user are treated so, and what the system refuses: a full disk, a name too long.
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

EXIT_CODE = 2

_ARGUMENT = re.compile(
    r"(?<![\w.])(?<!\w\()"  # not inside of a call that is spelt out, such as HqqFormat(nbits=4)
    r"(?P<config>(?:OffloadConfig|ExpertFormats)\.)?(?P<name>\w+)"
    r"""(?:=(?P<value>'[^']*'|"[^"]*"|-?\w+(?:\.\w+)*))?"""
)

_OF_AN_OPTION = {"predictor": "prefetch"}
"""Fields that an option of another name is for."""


class CommandError(MoeOffloadError):
    """What the command line asks for cannot be done, with the reason."""


@contextmanager
def one_line_errors(command: Any) -> Iterator[None]:
    """End the command with one line when an error of ours comes out of the block, or a refusal of the system.

    Meanwhile the Hub's client says nothing of what it tries again; what comes of it is the error.
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


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Make the errors with which Transformers answers a bad id, a bad file or a bad option ours; `what` begins them.

    It answers a config that no model can be built from with whatever Python raises on the way.
    """
    try:
        yield
    except MoeOffloadError:
        raise
    except OSError as error:
        raise CommandError(f"{what}: {system_words(error, what)}") from error
    except (ValueError, ImportError) as error:
        raise CommandError(f"{what}: {error}") from error
    except Exception as error:
        raise CommandError(f"{what}: {type(error).__name__}: {error}") from error


def system_words(error: OSError, before: str) -> str:
    """What the system refused, with the file's name unless that is in what is said `before`; others' errors as is."""
    if error.strerror is None:
        return str(error)
    is_named = error.filename is None or str(error.filename) in before
    return error.strerror if is_named else f"{error.strerror}: {error.filename}"


def expect_utf8(text: str | None, what: str) -> None:
    """Raise `CommandError` for text that came in bytes which are no UTF-8; no tokenizer takes it."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise CommandError(f"{what} is not valid UTF-8 after {error.start} characters; convert it") from error


def report(error: MoeOffloadError | OSError, command: Any) -> None:
    """Print an error as one line on stderr, in the words of the command (Typer's) that it ended."""
    said = system_words(error, "") if isinstance(error, OSError) else str(error)
    typer.echo(f"error: {in_option_names(' '.join(said.split()), command)}", err=True)


def in_option_names(message: str, command: Any) -> str:
    """The message to a caller from Python, for a caller of this command.

    What it writes as an argument or as a field of a config is written as the option that the command has for
    it: `overwrite=True` as `--overwrite`, `resume=False` as `--no-resume`, `OffloadConfig.cache_budget` as
    `--cache-budget`. What the command has no option for stays as it is, and what only Python can do is left out.
    """
    options = {option.name: option for option in command.params if option.param_type_name == "option"}

    def as_typed(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        option = options.get(_OF_AN_OPTION.get(name, name))
        if option is None or (value is None and not found["config"]):
            return found[0]
        if option.is_flag and value == "False":
            return option.secondary_opts[0] if option.secondary_opts else found[0]
        return option.opts[0] if option.is_flag or value is None else f"{option.opts[0]} {value}"

    return _ARGUMENT.sub(as_typed, message).replace(" or register your own", "")
