"""Decide from where a layer's decode steps are faster: from the host, or on the device. Pure.

From the host: it waits for the routing, has absent experts moved or computes some of them itself (`hybrid/split.py`),
and submits the arithmetic. On the device nothing is waited for, and absent experts are read in place, over the link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

from transformers_moe_offload.hybrid.split import MissRates, split


@dataclass(frozen=True)
class DecodeRates:
    """Measured times of a decode step of one token in one sparse layer."""

    misses: MissRates
    """Rates for experts that are moved or computed by the host."""
    resident_s: float
    """Seconds that the device takes for each expert in a slot."""
    read_s: float
    """The same for an expert that it reads in place."""
    host_s: float
    """Seconds of a layer from the host beyond the device's arithmetic: waiting, planning, submitting."""
    submit_s: float
    """Seconds for which a layer on the device keeps the host busy: no layer can take less, one after another."""

    def from_host_s(self, num_wanted: int, num_absent: int, *, computes: bool) -> float:
        """A layer from the host, which `computes` absent experts where that is faster, or has all of them moved."""
        if computes:
            asked = dict.fromkeys(range(num_absent), 1)
            served_s = split(asked, self.misses, asked).seconds
        else:
            served_s = num_absent * self.misses.fetch_s
        hits_s = (num_wanted - num_absent) * self.resident_s
        last_s = self.resident_s if num_absent else 0.0  # the last expert to land is computed after that
        return self.host_s + max(hits_s, served_s) + last_s

    def on_device_s(self, num_wanted: int, num_absent: int) -> float:
        """A layer on the device, whose memory and link take turns at worst."""
        device_s = (num_wanted - num_absent) * self.resident_s + num_absent * self.read_s
        return max(self.submit_s, device_s)


@dataclass(frozen=True)
class DecodeCosts:
    """The expected times of a layer, in seconds."""

    from_host_s: float
    on_device_s: float

    @property
    def is_device_faster(self) -> bool:
        """Whether to decode on the device."""
        return self.on_device_s < self.from_host_s


def costs(rates: DecodeRates, num_wanted: int, resident_share: float, *, computes: bool) -> DecodeCosts:
    """The expected times of a token that asks for so many experts of a layer, `resident_share` of which has slots.

    Every expert is assumed to be resident equally often: routing that prefers some experts does better, both ways.
    """

    def expected(cost: Callable[[int], float]) -> float:
        absent = 1.0 - resident_share
        return sum(
            comb(num_wanted, number) * absent**number * resident_share ** (num_wanted - number) * cost(number)
            for number in range(num_wanted + 1)
        )

    return DecodeCosts(
        from_host_s=expected(lambda number: rates.from_host_s(num_wanted, number, computes=computes)),
        on_device_s=expected(lambda number: rates.on_device_s(num_wanted, number)),
    )
