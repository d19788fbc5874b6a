"""Where on a device each expert can be read: its slot if it is resident, else its place in the arena.

One tensor for all layers, the same for as long as the engine lives, so that kernels and captured graphs can rely on it.
It changes on the compute stream only, between kernels that read it. So the host knows which addresses each of them
reads.
"""

# L layers, E experts of the layer that has most

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from transformers_moe_offload.device_decode.streams import Streams
from transformers_moe_offload.expert import ExpertId

NO_EXPERT = 0
"""The address in places of the table that belong to no expert."""


class AddressTable:
    """The addresses of all experts of some layers."""

    def __init__(self, homes: Mapping[int, Sequence[int]], device: torch.device, streams: Streams) -> None:
        """`homes` are addresses in the arena, by layer and expert; all experts are read there at first."""
        self._streams = streams
        width = max(map(len, homes.values()))
        rows = [[*home, *[NO_EXPERT] * (width - len(home))] for home in homes.values()]
        with torch.inference_mode(False):  # the table outlives an inference-mode block that may be open
            self.homes = torch.tensor(rows, dtype=torch.int64, device=device)
            """(L, E) int64, addresses in the arena; `NO_EXPERT` behind the last expert of a layer."""
            self.addresses = self.homes.clone()
            """(L, E) int64, where experts are to be read now."""
            self._flat = self.addresses.view(-1)
            self._of_layer = {layer: self.addresses[i, : len(home)] for i, (layer, home) in enumerate(homes.items())}
            self._homes_of_layer = {layer: self.homes[i, : len(home)] for i, (layer, home) in enumerate(homes.items())}
        self._home = {ExpertId(layer, e): at for layer, home in homes.items() for e, at in enumerate(home)}
        self._place = {ExpertId(layer, e): i * width + e for i, layer in enumerate(homes) for e in range(width)}
        self._in_slots: dict[ExpertId, int] = {}
        """Addresses in slots, of the experts that kernels submitted from now on read there."""
        self._arriving: dict[ExpertId, int] = {}
        """Addresses in slots that are not published yet."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in the order of the rows."""
        return tuple(self._of_layer)

    def of(self, layer: int) -> Tensor:
        """Addresses of a layer's experts, int64 (its experts,): always the same tensor."""
        return self._of_layer[layer]

    def in_slots(self, layer: int) -> Tensor:
        """Which of a layer's experts kernels submitted from now on read in a slot, bool (its experts,), on the device.

        One operation on the device, which a graph can capture: a replay has the table as it is then.
        """
        return self._of_layer[layer] != self._homes_of_layer[layer]

    def address(self, expert: ExpertId) -> int:
        """Where kernels submitted from now on read an expert."""
        return self._in_slots.get(expert, self._home[expert])

    def arrive(self, expert: ExpertId, address: int) -> None:
        """An expert can be read in a slot by work queued on the compute stream after this; see `publish`."""
        self._arriving[expert] = address

    @property
    def has_news(self) -> bool:
        """Whether an expert has arrived since `publish`."""
        return bool(self._arriving)

    def publish(self) -> None:
        """Let kernels submitted from now on read the experts that have arrived in their slots."""
        if self._arriving:
            self._in_slots |= self._arriving  # before the table: after an interrupt here, `leave` resets the table
            self._write(self._arriving)
            self._arriving = {}

    def leave(self, expert: ExpertId) -> None:
        """Kernels submitted from now on read an expert in the arena."""
        self._arriving.pop(expert, None)
        if expert in self._in_slots:
            self._write({expert: self._home[expert]})
            del self._in_slots[expert]

    def start_over(self) -> None:
        """Kernels submitted from now on read all experts in the arena."""
        self._streams.compute(lambda: self.addresses.copy_(self.homes))
        self._in_slots, self._arriving = {}, {}

    def _write(self, changes: Mapping[ExpertId, int]) -> None:
        """Queue changes of the table: one operation for one, three for any number."""
        places, addresses = [self._place[expert] for expert in changes], list(changes.values())
        if len(places) == 1:
            self._streams.compute(lambda: self._flat[places[0]].fill_(addresses[0]))
            return
        both = self._streams.host_memory((2, len(places)), torch.int64)
        both.copy_(torch.tensor([places, addresses]))

        def scatter() -> None:
            where, what = both.to(self._flat.device, non_blocking=True)  # copy: host -> device, async
            self._flat.scatter_(0, where, what)

        self._streams.compute(scatter)
