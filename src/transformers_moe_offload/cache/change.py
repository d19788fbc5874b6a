"""Detect changes of what is resident that were interrupted in the middle."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Changed(Protocol):
    """An object that changes step by step."""

    is_whole: bool
    """False while a change is going on, and after one was interrupted in the middle."""


class NotStartedError(Exception):
    """A load could not be started; what is resident is in order."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=Changed)


def change(method: Callable[Concatenate[C, P], T]) -> Callable[Concatenate[C, P], T]:
    """A method that leaves `is_whole` False if any exception but `NotStartedError` ends it in the middle."""

    @wraps(method)
    def changed(self: C, /, *arguments: P.args, **named: P.kwargs) -> T:
        was_whole, self.is_whole = self.is_whole, False
        try:
            result = method(self, *arguments, **named)
        except NotStartedError as failed:
            error = failed.error
        else:
            self.is_whole = was_whole
            return result
        self.is_whole = was_whole
        raise error

    return changed
