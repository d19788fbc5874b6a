"""What an eviction policy answers, and the list of policies by name.

A policy keeps the residents and how they were used. It orders them; the planner decides which of them may leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.registry import Registry

ORACLE = "belady"
"""The policy that evicts what is used again last. It has no factory: only a replay knows what comes, from its trace."""


class EvictionPolicy(Protocol):
    """Orders the residents for eviction.

    All experts that a layer wants are one request: the cache calls `begin`, asks for `candidates` if it needs room, and
    then calls, in ascending order of experts, `admit` for those that have become resident and `use` for all that were
    wanted. The order of arrival is not passed on. Only if they do not fit in together and pass through the slots in
    waves, `admit`, `use` and `forget` are called as they happen. An expert that was loaded ahead of demand is admitted
    without being used; until it is used, it should leave before every expert that has been used.
    """

    def begin(self, layer: int, wanted: Sequence[ExpertId]) -> None:
        """A layer is about to use these experts, all at once. Some may not be resident yet."""

    def admit(self, expert: ExpertId) -> None:
        """An expert has become resident."""

    def use(self, expert: ExpertId) -> None:
        """A resident is being used."""

    def forget(self, expert: ExpertId) -> None:
        """A resident has left."""

    def candidates(self) -> Iterator[ExpertId]:
        """All residents in eviction order, the first to leave at the front. They do not change during the iteration.

        Lazy, because few of them are taken. Iterating changes no state.
        """


_METHODS = ("begin", "admit", "use", "forget", "candidates")

PolicyFactory = Callable[[], EvictionPolicy]

_POLICIES: Registry[PolicyFactory] = Registry("policy")


def register_policy(name: str, *, exist_ok: bool = False) -> Callable[[PolicyFactory], PolicyFactory]:
    """Class decorator that makes a policy available as `OffloadConfig(policy=name)`.

    The class is called without arguments, once per cache. A name that is taken is an error unless `exist_ok`.
    """

    if name == ORACLE:
        raise ConfigError(f"the name {ORACLE!r} stands for the oracle of replays; choose another name")
    return _POLICIES.register(name, exist_ok=exist_ok)


def policy_names() -> list[str]:
    """The names that `OffloadConfig.policy` accepts."""
    return _POLICIES.names()


def make_policy(name: str) -> EvictionPolicy:
    """A fresh policy by its registered name."""
    if name == ORACLE:
        raise ConfigError(
            f"policy={ORACLE!r} needs future requests, which only a replay knows; choose one of {policy_names()}, "
            f"and compare it with {ORACLE} by `moe-offload replay`"
        )
    policy = _POLICIES[name]()
    missing = [method for method in _METHODS if not callable(getattr(policy, method, None))]
    if missing:
        raise ConfigError(f"policy={name!r}: {type(policy).__name__} has no method {', '.join(missing)}; add it")
    return policy
