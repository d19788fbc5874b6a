"""What an eviction policy answers, and the list of policies by name.

A policy knows the residents and how they were used. It orders them; the planner decides which of them may leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId


class EvictionPolicy(Protocol):
    """Orders the residents for eviction.

    The cache calls `admit` when an expert becomes resident, `use` each time a layer uses it (also right after
    `admit`), and `forget` when it has left.
    """

    def admit(self, expert: ExpertId) -> None:
        """An expert has become resident."""

    def use(self, expert: ExpertId) -> None:
        """A resident is being used."""

    def forget(self, expert: ExpertId) -> None:
        """A resident has left."""

    def candidates(self) -> Iterator[ExpertId]:
        """All residents, the one that should leave first at the front. The residents do not change meanwhile."""


_FACTORIES: dict[str, Callable[[], EvictionPolicy]] = {}


def register_policy(
    name: str, *, exist_ok: bool = False
) -> Callable[[Callable[[], EvictionPolicy]], Callable[[], EvictionPolicy]]:
    """Class decorator that makes a policy available as `OffloadConfig(policy=name)`.

    The class is called without arguments, once per cache. A name that is taken is an error unless `exist_ok`.
    """

    def register(factory: Callable[[], EvictionPolicy]) -> Callable[[], EvictionPolicy]:
        if name in _FACTORIES and not exist_ok:
            raise ConfigError(f"a policy named {name!r} is already registered; choose another name")
        _FACTORIES[name] = factory
        return factory

    return register


def policy_names() -> list[str]:
    """The names that `OffloadConfig.policy` accepts."""
    return sorted(_FACTORIES)


def make_policy(name: str) -> EvictionPolicy:
    """A fresh policy by its registered name."""
    if name not in _FACTORIES:
        raise ConfigError(f"policy={name!r} is not a known policy; choose one of {policy_names()} or register your own")
    return _FACTORIES[name]()
