"""The state of a `StaticCache` that a captured step depends on: tensors that it writes to, and lengths in Python.

`cache_utils.py` of Transformers, 5.23: layers write into tensors with fixed addresses, at the position in the tensor
`cumulative_length`. Sliding layers also count in Python, and take another branch once their window is full.
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
        return f"the KV cache is a {type(cache).__name__}; pass cache_implementation='static' to generate"
    if cache.offloading:
        return "the KV cache is offloaded to host memory"
    for layer in cache.layers:
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            return f"the KV cache has layers of {type(layer).__name__}, not StaticLayer or StaticSlidingWindowLayer"
        if not layer.is_initialized:
            return "the KV cache is empty"
    return None


def shape_of(cache: StaticCache, num_new: int) -> tuple[Any, ...]:
    """A key that is equal for caches which can share one captured step of `num_new` tokens."""
    return tuple(
        (type(layer), layer.keys.shape, layer.values.shape, layer.keys.dtype, layer.keys.device, _phase(layer, num_new))
        for layer in cache.layers
    )


class StaticPast:
    """The tensors from which a captured step reads the KV cache; one cache at a time owns them."""

    def __init__(self, cache: StaticCache) -> None:
        self._layers = [{name: getattr(layer, name) for name in WRITTEN} for layer in cache.layers]
        self._counts = counts(cache)
        """The counts at capture, which the graph holds as constants."""
        self._owner = weakref.ref(cache)

    @property
    def owner(self) -> StaticCache:
        """The cache that owns the tensors."""
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that a step writes to."""
        return [tensor for kept in self._layers for tensor in kept.values()]

    def serve(self, cache: StaticCache) -> bool:
        """Make a cache the owner, copying its content into the tensors; False while another cache owns them."""
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
        """Set the owner's counts in Python to those at capture, which the graph holds as constants."""
        set_counts(self.owner, self._counts)

    def _pairs(self, cache: StaticCache) -> list[tuple[dict[str, Tensor], StaticLayer]]:
        return list(zip(self._layers, cache.layers, strict=True))


def counts(cache: StaticCache) -> list[int | None]:
    """The length that each layer counts in Python; None for layers that only count in a tensor."""
    return [getattr(layer, "cumulative_length_int", None) for layer in cache.layers]


def set_counts(cache: StaticCache, numbers: list[int | None], more: int = 0) -> None:
    """Set the lengths that layers count in Python to `numbers`, each plus `more`."""
    for layer, number in zip(cache.layers, numbers, strict=True):
        if number is not None:
            layer.cumulative_length_int = number + more


def _phase(layer: StaticLayer, num_new: int) -> str:
    """The branch that a layer takes with `num_new` new tokens."""
    if not isinstance(layer, StaticSlidingWindowLayer):
        return "static"
    if layer.cumulative_length_int >= layer.max_cache_len:
        return "full"
    return "filling" if layer.cumulative_length_int + num_new <= layer.max_cache_len else "becoming full"
