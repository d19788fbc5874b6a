"""Keys and values of a text, in memory that has room for more tokens.

Transformers' cache copies all of them for each new token, which takes as long as attending to them does. Here a token
is written behind those that are there, and the cache gets a view of them all.
"""

# B texts, M heads of keys and values, S tokens, D columns of a head

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

LEAST_ROOM, SHARE_OF_ROOM = 64, 8
"""Room for as many tokens as this, or an eighth of those there are: so many steps need no copy."""


FEW_BYTES = 1 << 20
"""Of keys: fewer are copied faster than this takes."""


class _Kept(NamedTuple):
    """What a layer of a cache was given last, and the memory that it is the beginning of."""

    view: Tensor
    """(B, M, S, D)."""
    memory: Tensor
    """(B, M, S and more, D)."""


_UPDATES = (Cache.update, DynamicLayer.update)
"""Transformers' own; those that were put in their place later are asked, for they may do anything."""

_kept: WeakKeyDictionary[DynamicLayer, list[_Kept]] = WeakKeyDictionary()
"""Keys and values by layers of caches. A layer that holds another tensor by now, such as one that was cropped, gets new
memory: nothing is written behind tokens that anything else may have written behind."""


def extended(cache: Cache, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Put keys and values (B, M, 1, D) into a cache -> those of all its tokens, (B, M, S, D), as `cache.update`."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    is_own = (type(cache).update, DynamicLayer.update) == _UPDATES and "update" not in vars(cache)
    if not is_own or cache.offloading or not _concatenates(layer, keys, values):
        found: tuple[Tensor, Tensor] = cache.update(keys, values, layer_idx)
        return found
    assert isinstance(layer, DynamicLayer)
    before: Sequence[_Kept | None] = _kept.get(layer) or (None, None)
    pairs = zip(before, (layer.keys, layer.values), (keys, values), strict=True)
    now = _kept[layer] = [_appended(kept, held, new) for kept, held, new in pairs]
    layer.keys, layer.values = now[0].view, now[1].view
    return layer.keys, layer.values


def _concatenates(layer: Any, keys: Tensor, values: Tensor) -> bool:
    """Whether a layer of a cache does nothing but put these behind those that it has."""
    if type(layer) is not DynamicLayer or not layer.is_initialized or "update" in vars(layer):
        return False
    if layer.keys.nbytes < FEW_BYTES:
        return False
    return all(
        held.dim() == 4
        and held.is_cpu
        and held.dtype == new.dtype
        and (held.shape[0], held.shape[1], held.shape[3]) == (new.shape[0], new.shape[1], new.shape[3])
        for held, new in ((layer.keys, keys), (layer.values, values))
    )


def _appended(kept: _Kept | None, held: Tensor, new: Tensor) -> _Kept:
    """Tokens with some more behind them: in the same memory if they are all that is in it."""
    tokens, more = held.shape[2], new.shape[2]
    if (
        kept is None
        or kept.view is not held
        or held.data_ptr() != kept.memory.data_ptr()  # another `data` was set
        or kept.memory.shape[2] < tokens + more
    ):
        with torch.inference_mode(False):  # so that steps outside of it may write there, too
            room = max(LEAST_ROOM, tokens // SHARE_OF_ROOM)
            memory = held.new_empty(*held.shape[:2], tokens + room, held.shape[3])
        memory.narrow(2, 0, tokens).copy_(held)
    else:
        memory = kept.memory
    memory.narrow(2, tokens, more).copy_(new)
    # By `data`: to write behind a view does not count as a change of it, which gradients would refuse.
    return _Kept(memory.data.narrow(2, 0, tokens + more), memory)
