"""What a captured step has to know of `StaticCache`: which of its tensors it writes to, and what it counts in Python.

`cache_utils.py` of Transformers, 5.23: layers write into tensors that stay where they are, at the place that the tensor
`cumulative_length` says. Sliding ones count in Python as well, and go another way once their window is full.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

WRITTEN = ("keys", "values", "cumulative_length")
"""Tensors of a layer that a step reads and writes."""


def unfit(cache: Any) -> str | None:
    """Why a step over this cache cannot be captured; None if it can."""
    if type(cache) is not StaticCache:
        return f"its past is kept in a {type(cache).__name__}; generate(cache_implementation='static') has another"
    if cache.offloading:
        return "its past is kept in host memory"
    for layer in cache.layers:
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            return f"its past is kept in layers of {type(layer).__name__}"
        if not layer.is_initialized:
            return "there is no past yet"
    return None


def shape_of(cache: StaticCache, num_new: int) -> tuple[Any, ...]:
    """What two caches have to have in common for one captured step, with so many new tokens, to serve both."""
    return tuple(
        (type(layer), layer.keys.shape, layer.values.shape, layer.keys.dtype, layer.keys.device, _phase(layer, num_new))
        for layer in cache.layers
    )


class StaticPast:
    """The tensors that a captured step finds the past in, whichever cache they belong to at the time."""

    def __init__(self, cache: StaticCache) -> None:
        self._layers = [{name: getattr(layer, name) for name in WRITTEN} for layer in cache.layers]
        self._counts = counts(cache)
        """When the step was captured: what is in the graph in place of them."""
        self._owner = weakref.ref(cache)

    @property
    def owner(self) -> StaticCache:
        """The cache that has the tensors."""
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def tensors(self) -> list[Tensor]:
        """Those that a step writes to."""
        return [tensor for kept in self._layers for tensor in kept.values()]

    def serve(self, cache: StaticCache) -> bool:
        """Let a cache have the tensors, with its past in them; False while another cache does."""
        owner = self._owner()
        if owner is not cache:
            if owner is not None:
                return False
            for kept, layer in zip(self._layers, cache.layers, strict=True):
                for name, tensor in kept.items():
                    tensor.copy_(getattr(layer, name))
                    setattr(layer, name, tensor)
            self._owner = weakref.ref(cache)
        return all(getattr(layer, name) is t for kept, layer in self._pairs(cache) for name, t in kept.items())

    def as_captured(self) -> None:
        """Let Python count from where it did when the step was captured, which is all that a graph knows of it."""
        set_counts(self.owner, self._counts)

    def _pairs(self, cache: StaticCache) -> list[tuple[dict[str, Tensor], StaticLayer]]:
        return list(zip(self._layers, cache.layers, strict=True))


def counts(cache: StaticCache) -> list[int | None]:
    """What each layer counts in Python; None where it counts in a tensor alone."""
    return [getattr(layer, "cumulative_length_int", None) for layer in cache.layers]


def set_counts(cache: StaticCache, numbers: list[int | None], more: int = 0) -> None:
    """Let them count from there, and so many on."""
    for layer, number in zip(cache.layers, numbers, strict=True):
        if number is not None:
            layer.cumulative_length_int = number + more


def _phase(layer: StaticLayer, num_new: int) -> str:
    """Which way a layer goes with so many new tokens."""
    if not isinstance(layer, StaticSlidingWindowLayer):
        return "static"
    if layer.cumulative_length_int >= layer.max_cache_len:
        return "full"
    return "filling" if layer.cumulative_length_int + num_new <= layer.max_cache_len else "becoming full"
