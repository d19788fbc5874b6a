"""The fast tier: buffers that hold one expert's record each."""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.memory.record import RecordLayout


class SlotPool:
    """A number of equal buffers on one device.

    Each slot is an allocation of its own, so no single one has to be as large as the cache. On a CPU the memory of
    larger slots is only taken when they are first written.
    """

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        self.slot_bytes = slot_bytes
        self.device = device
        self._slots = [self._allocate() for _ in range(num_slots)]
        self._views: dict[tuple[int, RecordLayout], dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return len(self._slots) * self.slot_bytes

    def record(self, slot: int) -> Tensor:
        """A slot's bytes, (slot_bytes,) uint8."""
        return self._slots[slot]

    def views(self, slot: int, layout: RecordLayout) -> dict[str, Tensor]:
        """A slot seen as one expert. Valid until the slot is given to another expert; made once per slot."""
        views = self._views.get((slot, layout))
        if views is None:
            views = self._views[slot, layout] = layout.views(self._slots[slot])
        return views

    def _allocate(self) -> Tensor:
        return torch.empty(self.slot_bytes, dtype=torch.uint8, device=self.device)
