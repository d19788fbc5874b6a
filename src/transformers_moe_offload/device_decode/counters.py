"""Count on the device which experts were asked for, and whether they were resident; the host reads the counts later.

While a forward is submitted, each layer stores its routing, by one operation, at a fixed place in memory. Between two
forwards the routing is compared with the address table as it was for that forward, and the counts are sent to the host.
"""

# L layers, E experts of the layer that has most, T tokens, K experts per token

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from transformers_moe_offload.device_decode.background_fill import Use
from transformers_moe_offload.device_decode.streams import Mark, Streams
from transformers_moe_offload.device_decode.table import NO_EXPERT, AddressTable
from transformers_moe_offload.errors import MoeOffloadError

MOST_PAIRS = 512
"""(token, choice) pairs of a layer in one forward: 16 tokens, as many as decode on the device takes, of 32 choices."""

ABSENT, RESIDENT = 1, 2
"""The device's count for an expert that was asked for; 0 for the others."""


class Counters:
    """What the layers of a table ask for, one forward after the other."""

    def __init__(self, table: AddressTable, streams: Streams) -> None:
        self._table = table
        self._streams = streams
        self._row = {layer: row for row, layer in enumerate(table.layers)}
        self._layers = table.layers
        num_layers, self._width = table.homes.shape
        device = table.homes.device
        with torch.inference_mode(False):
            self._routed = torch.full((num_layers, MOST_PAIRS), self._width, dtype=torch.int64, device=device)
            """(L, pairs) int64: experts asked for; E, or more, in places without one."""
            self._asked = torch.zeros((num_layers, self._width + 1), dtype=torch.uint8, device=device)
            """(L, E + 1): 1 for experts asked for; the last column collects the places without one."""
            self._exists = (table.homes != NO_EXPERT).to(torch.uint8)
        self._places: dict[tuple[int, int], Tensor] = {}
        """Parts of `_routed`, by layer and number of pairs."""
        self._noted: set[int] = set()
        self._on_the_way: deque[tuple[Tensor, Mark]] = deque()
        self._spare: list[Tensor] = []

    def note(self, layer: int, top_k_index: Tensor) -> None:
        """A layer asks for experts: top_k_index (T, K) int64, on the device. Indices of no expert are ignored.

        One operation on the device, of fixed shape and place, that a graph can capture.
        """
        pairs = top_k_index.numel()
        if pairs > MOST_PAIRS:
            raise MoeOffloadError(
                f"layer {layer} asks for {pairs} experts in one forward on the device, which counts at most "
                f"{MOST_PAIRS}; forwards of more tokens go through the host"
            )
        if layer in self._noted:  # used twice in a forward: what it asked for first has to be counted first
            if self._streams.is_capturing():
                raise MoeOffloadError(
                    f"layer {layer} is used twice in one forward, which cannot be captured in a graph"
                )
            self.close()
        self._noted.add(layer)
        place = self._places.get((layer, pairs))
        if place is None:
            place = self._places[layer, pairs] = self._routed[self._row[layer], :pairs]
        self._streams.compute(lambda: place.copy_(top_k_index.reshape(-1)))

    @property
    def has_notes(self) -> bool:
        """Whether a layer has called `note` since `close`; replayed graphs do not count."""
        return bool(self._noted)

    def close(self) -> None:
        """A forward is over: compare the experts asked for with the table, and send the counts to the host."""
        self._noted.clear()
        reading = self._spare.pop() if self._spare else self._new_reading()
        self._streams.compute(lambda: self._compare_into(reading))
        self._on_the_way.append((reading, self._streams.mark()))

    def forget(self) -> None:
        """Drop the notes since `close`: they were only captured, and nothing was computed."""
        self._noted.clear()
        self._streams.compute(lambda: self._routed.fill_(self._width))

    def arrived(self, *, wait: bool = False) -> Iterator[list[Use]]:
        """The uses in each forward whose counts have reached the host, one forward after the other."""
        while self._on_the_way:
            reading, mark = self._on_the_way[0]
            if wait:
                mark.wait()
            elif not mark.is_done():
                return
            self._on_the_way.popleft()
            uses = self._uses(reading)
            self._spare.append(reading)
            yield uses

    def _new_reading(self) -> Tensor:
        """Host memory for one more forward's counts, one for each forward that the device is behind, which are few."""
        with torch.inference_mode(False):
            return self._streams.host_memory((len(self._row), self._width), torch.uint8)

    def _compare_into(self, reading: Tensor) -> None:
        """reading (L, E) uint8 gets `ABSENT` or `RESIDENT` for those asked for, else 0."""
        self._routed.clamp_(-1, self._width).remainder_(self._width + 1)  # -1 becomes E, too: no expert
        self._asked.zero_()
        self._asked.scatter_(1, self._routed, 1)
        self._routed.fill_(self._width)
        is_resident = self._table.addresses != self._table.homes
        asked = self._asked[:, : self._width] * self._exists
        reading.copy_(asked * (ABSENT + is_resident.to(torch.uint8)), non_blocking=True)  # copy: device -> host, async

    def _uses(self, reading: Tensor) -> list[Use]:
        """reading (L, E) uint8 -> the experts asked for, layer by layer."""
        states = reading.numpy()
        rows, experts = states.nonzero()
        wanted: dict[int, list[int]] = {}
        hits: dict[int, list[int]] = {}
        for row, expert, state in zip(rows.tolist(), experts.tolist(), states[rows, experts].tolist(), strict=True):
            wanted.setdefault(row, []).append(expert)
            if state == RESIDENT:
                hits.setdefault(row, []).append(expert)
        return [Use(self._layers[row], tuple(asked), frozenset(hits.get(row, ()))) for row, asked in wanted.items()]
