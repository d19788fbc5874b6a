"""Slots that hold nothing, and whose loads take time on a clock that does not tick by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.tracing.replay import NoSlots
from transformers_moe_offload.tuning.costs import Costs


@dataclass
class Clock:
    """Time of a prediction."""

    now_s: float = 0.0


class TimedSlots(NoSlots):
    """The slots of a replay, with loads that land when a machine of these costs would have them."""

    def __init__(self, costs: Costs, clock: Clock) -> None:
        self._costs = costs
        self._clock = clock
        self._last_s = -math.inf
        """When the load lands that was started last."""

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> TimedLoad:
        """Begin a load, which takes the computing thread for a moment."""
        self._clock.now_s += self._costs.start_s
        self._last_s = self._costs.landing_s(self._clock.now_s, self._last_s)
        return TimedLoad(self._costs, self._clock, self._last_s)


@dataclass
class TimedLoad:
    """An expert on its way."""

    costs: Costs
    clock: Clock
    lands_s: float

    @property
    def seconds(self) -> float:
        """How long it has the way into the slots for itself."""
        return self.costs.next_s

    def is_done(self) -> bool:
        """Whether it has landed by now."""
        return self.lands_s <= self.clock.now_s

    def finish(self) -> int:
        """Wait for it."""
        self.clock.now_s = self.costs.arrival_s(self.clock.now_s, self.lands_s)
        return 0

    def cancel(self) -> bool:
        """Always False: the system has been asked for it."""
        return False
