"""The known name that a misspelt one is nearest to, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 100
"""Characters of a misspelt name that are compared: the time grows with their square, and names are untrusted."""


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message: `; did you mean 'lru'?`, or `otherwise` where `name` is like no known name, or no text."""
    near = difflib.get_close_matches(name[:_LONGEST], list(known), n=1) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else otherwise
