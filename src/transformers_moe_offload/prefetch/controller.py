"""Find out by trying whether prefetching pays, and leave it off while it does not.

Loads that nobody asked for take time from the link, from slots and from the processor, so whether they help depends on
the machine, the model and the text. Steps with and without them alternate for a while, their times are compared, and
the better way is kept until the next trial.
"""

from __future__ import annotations

from statistics import median

BLOCK_STEPS = 5
"""Steps in a row with or without prefetching; the first of them still feels the block before and is not counted."""

TRIAL = (False, True, True, False)
"""Whether the blocks of a trial are done with prefetching: in this order, what gets steadily faster, such as a cache
that fills up, favours neither way."""

FIRST_HOLD, LONGEST_HOLD = 64, 1024
"""Steps between two trials; twice as many after each trial that ends like the one before it. A trial of 20 steps, half
of which go the slower way, then costs less than a sixth of the difference, and soon a hundredth."""

LEAST_GAIN = 0.01
"""Part of a step that prefetching must save to be kept."""


class Controller:
    """Told how long each step took, says how the next one is to be done."""

    def __init__(self) -> None:
        self.is_on = TRIAL[0]
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._step = 0
        """Steps since the trial began, or, outside of trials, steps to go until the next one."""
        self._in_trial = True
        self._hold = FIRST_HOLD
        self._verdict: bool | None = None

    def took(self, seconds: float) -> None:
        """A step is over."""
        if self._in_trial:
            if self._step % BLOCK_STEPS:
                self._times[self.is_on].append(seconds)
            self._step += 1
            if self._step == BLOCK_STEPS * len(TRIAL):
                self._conclude()
            else:
                self.is_on = TRIAL[self._step // BLOCK_STEPS]
        else:
            self._step -= 1
            if self._step == 0:
                self._in_trial, self.is_on = True, TRIAL[0]

    def _conclude(self) -> None:
        pays = median(self._times[True]) < (1 - LEAST_GAIN) * median(self._times[False])
        self._hold = min(2 * self._hold, LONGEST_HOLD) if pays == self._verdict else FIRST_HOLD
        self.is_on = self._verdict = pays
        self._times = {True: [], False: []}
        self._in_trial, self._step = False, self._hold
