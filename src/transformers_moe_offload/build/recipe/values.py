"""Values of a recipe that cannot be are refused where they are given."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from math import isfinite
from typing import Any

from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import quoted


def expect_choice(owner: Any, name: str, choices: Sequence[str | None]) -> None:
    """One of these."""
    value = getattr(owner, name)
    if value not in choices:
        raise RecipeError(
            f"{name}={quoted(value)} is not one of "
            f"{', '.join(str(choice) for choice in choices)}{_near(value, choices)}"
        )


def expect_texts(owner: Any, *names: str) -> None:
    """Texts that are not empty; None where that is the default."""
    for name in names:
        value = getattr(owner, name)
        is_optional = next(f for f in fields(owner) if f.name == name).default is None
        if not (isinstance(value, str) and value) and not (value is None and is_optional):
            raise RecipeError(f"{name}={quoted(value)} is not a text")


def expect_positive(owner: Any, *names: str) -> None:
    """Whole numbers from 1 on, or None."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and (type(value) is not int or value < 1):
            raise RecipeError(f"{name}={quoted(value)} is not a whole number of at least 1")


def expect_whole(owner: Any, *names: str) -> None:
    """Whole numbers from 0 on."""
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int or value < 0:
            raise RecipeError(f"{name}={quoted(value)} is not a whole number of at least 0")


def expect_numbers(owner: Any, *names: str) -> None:
    """Numbers, whole or not, that are not infinite."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise RecipeError(f"{name}={quoted(value)} is not a number")


def freeze_texts(owner: Any, *names: str) -> None:
    """Lists of texts, as tuples."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, str) or not all(isinstance(text, str) for text in value):
            raise RecipeError(f"{name}={quoted(value)} is not a list of texts")
        object.__setattr__(owner, name, tuple(value))


def _near(value: object, choices: Sequence[str | None]) -> str:
    near = difflib.get_close_matches(str(value), [choice for choice in choices if choice], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
