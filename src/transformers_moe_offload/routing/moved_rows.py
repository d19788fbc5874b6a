"""Notice that a KV cache moves rows, as beam search makes it do after each step, or drops tokens.

A cache does not report that, and its content no longer shows it once more tokens have been read. So the methods that
move rows or drop tokens are wrapped, in all classes of caches, while there is a listener.
"""

# B rows of a cache

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from transformers_moe_offload.hf.upstream import FORGET_TOKENS, MOVE_ROWS

Move = Callable[[Sequence[int]], list[int]]
"""Maps the rows before the move, one entry each, to the rows after it.

Raises `IndexError`, `RuntimeError` or `TypeError` for a number of rows that the cache cannot have had.
"""
Listener = Callable[[Cache, Move | None], None]
"""Called with a cache and its move; the move is None if the cache has dropped tokens, or all of them."""

_listeners: list[Listener] = []
_wrapped: list[tuple[type, str, Any]] = []
"""Class, name of the method, and original method of each wrapper."""
_changing = threading.Lock()
_moving = threading.local()
"""`.cache`: the cache whose method this thread is in; these methods may call one another."""


def listen(listener: Listener) -> None:
    """Call `listener(cache, move)` whenever a cache has moved rows or dropped tokens, in the thread that did it."""
    with _changing:
        if not _listeners:
            _wrap()
        _listeners.append(listener)


def stop_listening(listener: Listener) -> None:
    """Undo `listen`, once."""
    with _changing:
        _listeners.remove(listener)
        if not _listeners:
            while _wrapped:
                kind, name, method = _wrapped.pop()
                setattr(kind, name, method)


def _wrap() -> None:
    for kind in _classes(Cache):
        for name in (*MOVE_ROWS, *FORGET_TOKENS):
            if name in vars(kind):
                method = vars(kind)[name]
                _wrapped.append((kind, name, method))
                setattr(kind, name, _telling(name, method))


def _classes(kind: type) -> Iterator[type]:
    derived: type
    yield kind
    for derived in kind.__subclasses__():
        yield from _classes(derived)


def _telling(name: str, method: Any) -> Any:
    @functools.wraps(method)
    def moved(self: Cache, *args: Any, **kwargs: Any) -> Any:
        outer, _moving.cache = getattr(_moving, "cache", None), self
        is_told = outer is not self
        # Before the call: the caller's tensor may change later.
        (how, *_) = (*args, *kwargs.values(), None)
        move = _move(name, how) if is_told and name in MOVE_ROWS else None
        try:
            result = method(self, *args, **kwargs)
        finally:
            _moving.cache = outer
        if is_told:
            for listener in _listeners.copy():
                listener(self, move)
        return result

    return moved


def _move(name: str, how: Any) -> Move:
    """The move of a method of `MOVE_ROWS`: on rows (B,), what layers of caches do to keys (B, ...)."""
    how = how.detach().to("cpu", copy=True) if isinstance(how, Tensor) else copy(how)  # sync: device -> host

    def move(before: Sequence[int]) -> list[int]:
        places = torch.arange(len(before))
        if name == "reorder_cache":
            places = places.index_select(0, how)
        elif name == "batch_select_indices":
            places = places[how, ...]
        else:
            places = places.repeat_interleave(how, dim=0)
        return [before[place] for place in places.tolist()]

    return move
