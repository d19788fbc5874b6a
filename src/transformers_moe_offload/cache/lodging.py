"""Decide which experts of one GPU have a copy in the memory that another has to spare. Pure.

What is brought into a slot from there leaves the link to the host to experts that are read in place.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

from transformers_moe_offload.expert import ExpertId

D = TypeVar("D", bound=Hashable)
"""A device."""


def lodgings(
    record_bytes: Mapping[D, Mapping[ExpertId, int]], spare_bytes: Mapping[D, int], faster: Mapping[D, Sequence[D]]
) -> dict[D, dict[ExpertId, D]]:
    """By device, which of its experts have a copy where.

    `record_bytes` are those of each device's experts that do not all have slots, `spare_bytes` what each device has
    left, and `faster` the other devices from which a copy comes faster than from the host, the fastest first. Devices
    take turns; of each the experts are spread over its layers, as nobody knows yet which will be asked for.
    """
    left = dict(spare_bytes)
    found: dict[D, dict[ExpertId, D]] = {device: {} for device in record_bytes}
    for device, expert, nbytes in _in_turns(record_bytes):
        place = next((other for other in faster.get(device, ()) if left.get(other, 0) >= nbytes), None)
        if place is not None:
            left[place] -= nbytes
            found[device][expert] = place
    return found


def _in_turns(record_bytes: Mapping[D, Mapping[ExpertId, int]]) -> Iterator[tuple[D, ExpertId, int]]:
    """One expert of each device, then another one; the first of all layers before the second of any."""
    ordered = [
        [(device, expert, sizes[expert]) for expert in sorted(sizes, key=lambda one: (one.expert, one.layer))]
        for device, sizes in record_bytes.items()
    ]
    for together in zip_longest(*ordered):
        yield from (one for one in together if one is not None)
