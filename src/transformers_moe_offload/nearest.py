"""The known name that a misspelt one is nearest to, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 100
"""Characters of a misspelt name that are compared: the time grows with their square, and names are untrusted."""


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name most like `name`; None if none is like it, or if it is no text."""
    found = difflib.get_close_matches(name[:_LONGEST], list(known), n=1) if isinstance(name, str) else []
    return found[0] if found else None


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message: `; did you mean 'lru'?`, or `otherwise` where no known name is like it."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else otherwise
