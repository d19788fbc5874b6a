"""Checks that refuse impossible values of a recipe where they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.nearest import did_you_mean
from transformers_moe_offload.untrusted import quoted

MAX_NUMBER = 2.0**100
"""Largest factor or scale: beyond it, arithmetic with weights overflows; 32-bit floats end at 2 ** 128."""
MAX_NAME = 255
"""Bytes of a name in a folder, in most filesystems. Repositories of the Hub have 96 characters at most."""


@dataclass(frozen=True)
class Section:
    """A part of a recipe: its methods refuse impossible values of the fields that are named."""

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _is_optional(self, name: str) -> bool:
        return next(field for field in fields(self) if field.name == name).default is None

    def _expect_choice(self, name: str, choices: Sequence[str | None]) -> None:
        """Refuse a value that is not one of these."""
        value = getattr(self, name)
        if value not in choices:
            raise RecipeError(
                f"{name}={quoted(value)} is not one of {', '.join(str(choice) for choice in choices)}"
                f"{did_you_mean(value, filter(None, choices))}"
            )

    def _expect_texts(self, *names: str) -> None:
        """Texts that are not empty, and short enough to name something; None where that is the default."""
        for name in names:
            value = getattr(self, name)
            if value is None and self._is_optional(name):
                continue
            if not (isinstance(value, str) and value and _can_be_written(value)):
                raise RecipeError(f"{name}={quoted(value)} is not a text")
            if any(len(part) > MAX_NAME for part in value.split("/")):
                raise RecipeError(f"{name}={quoted(value)} is longer than the name of a file or a repository can be")

    def _expect_whole(self, *names: str, least: int = 0) -> None:
        """Whole numbers from `least` on; None where that is the default."""
        for name in names:
            value = getattr(self, name)
            if value is None and self._is_optional(name):
                continue
            if type(value) is not int or not least <= value < 2**63:
                raise RecipeError(f"{name}={quoted(value)} is not a whole number of at least {least}, below 2**63")

    def _expect_numbers(self, *names: str) -> None:
        """Numbers, whole or not, that are not infinite."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
                raise RecipeError(f"{name}={quoted(value)} is not a number")

    def _freeze_texts(self, *names: str) -> None:
        """Lists of texts, as tuples."""
        for name in names:
            value = getattr(self, name)
            texts = value if isinstance(value, list | tuple) else [None]
            if not all(isinstance(text, str) and _can_be_written(text) for text in texts):
                raise RecipeError(f"{name}={quoted(value)} is not a list of texts")
            self._set(name, tuple(value))


def _can_be_written(text: str) -> bool:
    """Whether a text is free of lone surrogates and zero bytes, which files and tokenizers cannot take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
