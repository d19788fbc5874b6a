"""How much of the processor other programs take while something is timed."""

from __future__ import annotations

import time

import psutil

LITTLE = 0.15
"""Cores: what the system itself takes now and then. More slows down what is timed."""


class OtherPrograms:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._began_s, self._busy_s = time.monotonic(), _busy_s()

    def cores(self) -> float:
        """Cores that other programs have kept busy since then, on average, those of other machines on the same
        processor included where the system tells of them."""
        elapsed_s = time.monotonic() - self._began_s
        return max(0.0, (_busy_s() - self._busy_s) / elapsed_s) if elapsed_s else 0.0


def _busy_s() -> float:
    """Seconds that all cores together were busy with anything else than this process."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    names = ("user", "system", "nice", "irq", "softirq", "steal")  # guests are part of user
    busy_s: float = sum(getattr(times, name, 0.0) for name in names) - own.user - own.system
    return busy_s
