"""How messages quote what others have written: on part of a line, whatever it is.

A value of a file may be a megabyte of text, be nested a thousand levels deep, hold a million others through YAML's
aliases, or have no `repr` at all, as numbers of more digits than Python writes.
"""

from __future__ import annotations

from reprlib import Repr

_MAX_CHARACTERS = 160
"""Of a quoted value: with what a message says about it, that is a line or two."""


class _Quoting(Repr):
    """`repr`, cut at a few levels, entries and characters; it never builds what is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = 120

    def repr_int(self, value: int, level: int) -> str:
        """The number, or how long it is."""
        return repr(value) if abs(value) < 10**40 else f"<a number of {value.bit_length():,} bits>"


_QUOTING = _Quoting()


def quoted(value: object) -> str:
    """What a message says instead of `repr(value)`."""
    return one_line(_QUOTING.repr(value), _MAX_CHARACTERS)


def one_line(text: object, max_characters: int = 300) -> str:
    """A text without line breaks, cut where it is too long, which any terminal can show.

    For names that are quoted as they are, and for what other libraries say in their errors.
    """
    text = str(text)
    cut = text[: 4 * max_characters]
    line = " ".join(cut.split()).encode("utf-8", "backslashreplace").decode()
    return line if len(cut) == len(text) and len(line) <= max_characters else f"{line[: max_characters - 3]}..."
