"""Messages about what is untrusted: values quoted on part of a line, and errors of other libraries as one of ours.

A value of a file may be a megabyte of text, be nested a thousand levels deep, hold a million others through YAML's
aliases, or have no `repr` at all: an integer with more digits than Python converts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import Repr

from transformers_moe_offload.errors import CheckpointError, MoeOffloadError

_MAX_CHARACTERS = 160
"""Longest quoted value; a message with one fills a line or two."""


class _Quoting(Repr):
    """`repr`, limited to a few levels, entries and characters; parts that are cut off are never built."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = 120

    def repr_int(self, value: int, level: int) -> str:
        """The number, or its length in bits if it is huge."""
        return repr(value) if abs(value) < 10**40 else f"<a number of {value.bit_length():,} bits>"


_QUOTING = _Quoting()


def quoted(value: object) -> str:
    """A short `repr(value)` for messages, on one line."""
    return one_line(_QUOTING.repr(value), _MAX_CHARACTERS)


def one_line(text: object, max_characters: int = 300) -> str:
    """A text without line breaks, cut to `max_characters`, that any terminal can show.

    For names that are quoted as they are, and for the messages of other libraries' errors.
    """
    text = str(text)
    cut = text[: 4 * max_characters]
    line = " ".join(cut.split()).encode("utf-8", "backslashreplace").decode()
    return line if len(cut) == len(text) and len(line) <= max_characters else f"{line[: max_characters - 3]}..."


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn every error of the block into a `CheckpointError` whose message `what` begins; ours stay as they are.

    This covers every exception, because a config that no model can be built from may raise anything.
    """
    try:
        yield
    except MoeOffloadError:
        raise
    except Exception as error:
        said = system_words(error, what) if isinstance(error, OSError) else str(error)
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{what}: {kind}{said}") from error


def system_words(error: OSError, before: str) -> str:
    """The system's message, with the file's name unless `before` contains it; unchanged without `strerror`."""
    if error.strerror is None:
        return str(error)
    is_named = error.filename is None or str(error.filename) in before
    return error.strerror if is_named else f"{error.strerror}: {error.filename}"
