"""Count forward passes from the order in which layers ask for experts; policies see nothing else of a pass.

Most models run each layer once in a forward. Some run a few layers in the middle several times before they go on to the
next (`inkling2_loop`), so a layer that asks again need not mean that a new forward has begun.
"""

from __future__ import annotations

from collections import Counter


class Passes:
    """A pass ends with the last layer, or when a layer asks that does not come after the one that began the pass.

    A step back from a layer in the middle is a loop within the pass. Loops that include the first or the last of the
    layers cannot be told from passes by the order of layers; each of their turns counts as one.
    """

    def __init__(self, last: int | None = None) -> None:
        """`last` is the last layer there is; without it, it is the highest that has asked so far."""
        self.count = 0
        self._first: int | None = None
        self._layer = -1
        self._last = -1 if last is None else last
        self._turns: Counter[int] = Counter()
        """Of each layer, in this pass."""
        self._usual_turns: dict[int, int] = {}
        """Of each layer, in the latest complete pass that came to it."""

    def begin(self, layer: int) -> bool:
        """A layer asks; returns whether a new pass begins with it. The first pass of all is not new."""
        is_new = self._first is not None and (layer <= self._first or layer <= self._layer == self._last)
        if is_new:
            self._usual_turns |= self._turns
            self._turns.clear()
            self.count += 1
        if is_new or self._first is None:
            self._first = layer
        self._layer = layer
        self._last = max(self._last, layer)
        self._turns[layer] += 1
        return is_new

    def is_over(self, layer: int) -> bool:
        """Whether a layer has had as many turns in this pass as in the latest complete one that came to it, or one."""
        return self._turns[layer] >= self._usual_turns.get(layer, 1)
