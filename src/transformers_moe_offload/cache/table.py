"""Where the resident experts of a layer are, for code that computes with them without asking the cache."""

from __future__ import annotations

from typing import Protocol

from transformers_moe_offload.store.layer_source import Weights


class ExpertTable(Protocol):
    """The residents of one sparse layer. The cache keeps it; it is read with the cache's turn held."""

    def put(self, expert: int, weights: Weights, until: float) -> None:
        """An expert is resident. From the time `until` on, in seconds of `time.monotonic`, it takes a visit to know
        whether it still is."""

    def keep_until(self, expert: int, until: float) -> None:
        """A visit has found a resident where it was."""

    def take_away(self, expert: int) -> None:
        """An expert is not resident any more."""
