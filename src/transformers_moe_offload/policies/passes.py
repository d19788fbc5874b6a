"""Count forward passes from the order in which layers ask, which is all that a policy gets to see of them."""

from __future__ import annotations


class Passes:
    """A new pass begins when a layer asks that does not come after the one before it."""

    def __init__(self) -> None:
        self.count = 0
        self._layer = -1

    def begin(self, layer: int) -> bool:
        """A layer asks; returns whether a new pass begins with it."""
        is_new = layer <= self._layer
        self._layer = layer
        self.count += is_new
        return is_new
