"""Predict which layers a forward comes to next, and in what order: that of the last forward.

Most models run their sparse layers in order and once in a forward. Some run a few of them several times, and the steps
of a decoder leave its encoder out.
"""

from __future__ import annotations

from transformers_moe_offload.policies.passes import Passes


class Route:
    """Follows the visits of a model's sparse layers, which are numbered by their place in the model."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._passes = Passes(num_layers - 1)
        self._before: list[int] = []
        """The places of the last complete forward, in order."""
        self._now: list[int] = []
        """Those of this one so far."""

    def visit(self, place: int) -> bool:
        """A layer is visited; returns whether a forward begins with it."""
        is_first = self._passes.begin(place) or not self._now
        if is_first:
            self._before, self._now = self._now, []
        if len(self._now) < _MOST_TURNS * self._num_layers:
            self._now.append(place)
        return is_first

    def ahead(self, most: int) -> dict[int, int]:
        """The next few places after the one that is visited, each once, with the number of visits until then.

        The places of the next forward follow the last of this one. If this forward differs from the last, or the last
        was interrupted, layers are expected in the order of the model.
        """
        place, num_visits = self._now[-1], len(self._now)
        is_like_the_last = self._before[:num_visits] == self._now
        as_before = [*self._before[num_visits:], *self._before] if is_like_the_last else []
        order = [*as_before, *((place + step) % self._num_layers for step in range(1, self._num_layers))]
        found: dict[int, int] = {}
        for visits, other in enumerate(order, start=1):
            if len(found) == most:
                break
            if other != place:
                found.setdefault(other, visits)
        return found


_MOST_TURNS = 64
"""Turns of a layer in one forward that are followed: a bound for memory where no forward seems to end."""
