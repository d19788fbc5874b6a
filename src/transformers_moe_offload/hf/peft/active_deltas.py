"""The adapters on experts that are active in the current forward.

The wrappers that PEFT puts around an experts module register their factors here while they call it, and the layer reads
them. Each thread has its own registrations.
"""

# E experts, R rank

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from transformers_moe_offload.compute.deltas import LowRank

_Additions = Mapping[tuple[int, str], Sequence[LowRank]]

_added: ContextVar[_Additions] = ContextVar("added", default=MappingProxyType({}))


@contextmanager
def adding(layer: object, field: str, additions: Sequence[LowRank]) -> Iterator[None]:
    """Register additions to a field of a layer's experts inside a `with` block."""
    token = _added.set({**_added.get(), (id(layer), field): additions})
    try:
        yield
    finally:
        _added.reset(token)


are_any_added = _added.get
"""Whether any additions are active; not a function of ours, as it is called in each step."""


def added_to(layer: object) -> dict[str, Sequence[LowRank]]:
    """Field -> the active additions to a layer's experts."""
    return {field: additions for (owner, field), additions in _added.get().items() if owner == id(layer) and additions}
