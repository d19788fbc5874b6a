"""Implementations by name: what an option chooses from, and users add to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.nearest import did_you_mean
from transformers_moe_offload.untrusted import quoted

Item = TypeVar("Item")


class Registry(Generic[Item]):
    """The implementations of one family. `family` is what one of them is called, and the option that names one."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._items: dict[str, Item] = {}

    def register(self, name: str, *, exist_ok: bool = False) -> Callable[[Item], Item]:
        """Decorator that adds an implementation. A name that is taken is an error unless `exist_ok`."""

        def add(item: Item) -> Item:
            if name in self._items and not exist_ok:
                raise ConfigError(f"a {self._family} named {quoted(name)} is already registered; choose another name")
            self._items[name] = item
            return item

        return add

    def names(self) -> list[str]:
        """The names that there are, in alphabetical order."""
        return sorted(self._items)

    def __getitem__(self, name: str) -> Item:
        """An implementation by its name; `ConfigError` with the nearest one if there is none."""
        if name not in self._items:
            raise ConfigError(
                f"{self._family}={quoted(name)} is not a known {self._family}; choose one of {self.names()} or "
                f"register your own{did_you_mean(name, self._items)}"
            )
        return self._items[name]
