"""What all policies but the oracle share: experts that were loaded ahead and not used yet are evicted first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from transformers_moe_offload.expert import ExpertId


class UnusedFirst(ABC):
    """A policy of which a subclass orders the residents that have been used.

    An `OrderedDict` here and there, because a plain dictionary finds its first entry only after skipping removed ones.
    """

    def __init__(self) -> None:
        self._unused: OrderedDict[ExpertId, None] = OrderedDict()

    def begin(self, layer: int, wanted: Sequence[ExpertId]) -> None:  # noqa: B027
        """A layer is about to use experts: no effect, unless a policy counts visits or passes."""

    def admit(self, expert: ExpertId) -> None:
        """An expert has become resident."""
        self._unused[expert] = None

    @abstractmethod
    def use(self, expert: ExpertId) -> None:
        """A resident is being used."""

    def forget(self, expert: ExpertId) -> None:
        """A resident has left."""
        if expert in self._unused:
            del self._unused[expert]
        else:
            self._forget_used(expert)

    def candidates(self) -> Iterator[ExpertId]:
        """Those never used, then the others in the policy's order."""
        return chain(self._unused, self._used())

    @abstractmethod
    def _forget_used(self, expert: ExpertId) -> None: ...

    @abstractmethod
    def _used(self) -> Iterable[ExpertId]: ...
