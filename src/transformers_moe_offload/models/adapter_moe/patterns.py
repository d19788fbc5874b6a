"""Values that an adapter's config gives by pattern (`rank_pattern`, `alpha_pattern`), as PEFT finds them.

A pattern is a regular expression for the end of a module's path (`peft/utils/other.py`, `get_pattern_key`, 0.21). It
comes with the adapter, and one such as `(a+)+` keeps Python busy for ever. So patterns are read that have few ways to
match; those PEFT's users write are names, or names with one or two numbers left open.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .configuration_adapter_moe import AdapterMoeError

_ATOM = r"(?:[\w\-/. ]|\\[.dw\-]|\[[\w\-]+\])"
_PIECES = rf"(?:{_ATOM}[*+?]?)*"
_GROUP = rf"\((?:\?:)?{_PIECES}(?:\|{_PIECES})*\)"
_READ = re.compile(rf"\^?(?:{_ATOM}[*+?]?|{_GROUP})+\$?")
"""Characters, classes and groups that are not repeated as a whole."""
_MAX_CHARACTERS = 500
_MAX_REPEATS = 2
_MAX_CHOICES = 128
_MAX_OPEN = 1000
"""Patterns that are no plain names; plain ones are compared in no time."""


def pattern_key(patterns: Mapping[str, Any], path: str) -> str | None:
    """The first pattern that the end of a path matches."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)


def expect_patterns(name: str, patterns: Any) -> None:
    """Raise `AdapterMoeError` for what is no mapping of patterns to numbers above zero, or has a pattern that is not "
    "read."""
    if not isinstance(patterns, dict):
        raise AdapterMoeError(f"{name} is no mapping of modules to numbers but a {type(patterns).__name__}")
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            raise AdapterMoeError(f"{name} has no number above 0 for {_brief(pattern)}")
        if not _is_read(pattern):
            raise AdapterMoeError(
                f"{name} has the pattern {_brief(pattern)}; patterns are read that name modules, with up to "
                f"{_MAX_REPEATS} parts repeated by *, + or ? and no repeated groups: write the modules' names instead"
            )
    if sum(not re.fullmatch(r"[\w.]+", pattern) for pattern in patterns) > _MAX_OPEN:
        raise AdapterMoeError(f"{name} has more than {_MAX_OPEN} patterns that are no plain names")


def _is_read(pattern: str) -> bool:
    # The length comes first, so that this check itself is quick.
    if len(pattern) > _MAX_CHARACTERS or not _READ.fullmatch(pattern):
        return False
    repeats = sum(pattern.replace("(?:", "(").count(sign) for sign in "*+?")
    choices = 1
    for group in re.findall(r"\([^)]*\)", pattern):
        choices *= group.count("|") + 1
    if repeats > _MAX_REPEATS or choices > _MAX_CHOICES:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
