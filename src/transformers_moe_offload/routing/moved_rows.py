"""Notice that rows of a KV cache are moved, as beam search moves them after each step.

A cache does not report that, and nothing in it shows that afterwards. So the methods that move rows are wrapped, in all
classes of caches, as long as there is a listener.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import Cache

from transformers_moe_offload.hf.upstream import MOVE_ROWS

Move = Callable[[Sequence[int]], list[int]]
"""From what the rows were, one entry each, to what they are."""
Listener = Callable[[Cache, Move], None]

_listeners: list[Listener] = []
_wrapped: list[tuple[type, str, Any]] = []
"""Classes, methods, and what was there before."""
_changing = threading.Lock()
_moving = threading.local()
"""`.cache`: the one whose rows this thread is moving; its methods may call one another."""


def listen(listener: Listener) -> None:
    """Call `listener(cache, move)` whenever rows of a cache have been moved, in the thread that moves them."""
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
        for name in MOVE_ROWS:
            if name in vars(kind):
                method = vars(kind)[name]
                _wrapped.append((kind, name, method))
                setattr(kind, name, _telling(method))


def _classes(kind: type) -> Iterator[type]:
    derived: type
    yield kind
    for derived in kind.__subclasses__():
        yield from _classes(derived)


def _telling(method: Any) -> Any:
    @functools.wraps(method)
    def moved(self: Cache, *args: Any, **kwargs: Any) -> Any:
        outer, _moving.cache = getattr(_moving, "cache", None), self
        try:
            result = method(self, *args, **kwargs)
        finally:
            _moving.cache = outer
        if outer is not self:
            (rows,) = (*args, *kwargs.values())
            move = _repeated(rows) if isinstance(rows, int) else _chosen(rows)
            for listener in _listeners.copy():
                listener(self, move)
        return result

    return moved


def _chosen(rows: Tensor) -> Move:
    places = rows.tolist()  # sync: device -> host
    return lambda before: [before[place] for place in places]


def _repeated(times: int) -> Move:
    return lambda before: [row for row in before for _ in range(times)]
