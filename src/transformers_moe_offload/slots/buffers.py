"""Slots that are buffers on one device, which experts are copied into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.transfer import Copier, Transfer
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import Weights
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.system.host_memory import PageMemory


def allocated_bytes(slot_bytes: int, device: torch.device) -> float:
    """Bytes of a device's memory that each of many slots of a size takes, with what the allocator wastes.

    torch's allocator of GPU memory (`c10/core/AllocatorConfig.h`, 2.13) asks for segments of 2 MiB for tensors of up to
    1 MiB, and of 20 MiB for those below 10 MiB. So two tensors of 7 MiB fit into a segment, and 6 MiB are left over.
    Larger ones have segments of their own, a multiple of 2 MiB.
    """
    if device.type != "cuda":
        return slot_bytes
    size = -(-slot_bytes // 512) * 512
    if size >= 10 << 20:
        return -(-size // (2 << 20)) * (2 << 20)
    segment = (2 if size <= 1 << 20 else 20) << 20
    return segment / (segment // size)


class SlotPool:
    """Buffers on one device, equal unless one is made to `fit` a record of another size.

    Each slot is an allocation of its own, so no single one has to be as large as the cache. On a CPU the memory of
    larger slots is only taken when they are first written.
    """

    def __init__(self, slot_bytes: int, device: torch.device, pages: PageMemory | None = None) -> None:
        """`pages`: memory on the CPU that slots are cut from, in huge pages where the system has them; what is given
        back must not be read any more. A step that streams experts of 6 MiB through two cores takes 7 % less time from
        there (11.2 and 12.1 ms, an EPYC with AVX-512).
        """
        self.slot_bytes = slot_bytes
        self.device = device
        self._slots: dict[int, _Buffer] = {}
        self._pages = pages

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.memory.nbytes for slot in self._slots.values())

    def add(self, slot: int) -> None:
        """Allocate a buffer."""
        self._allocate(slot, self.slot_bytes)

    def fit(self, slot: int, nbytes: int) -> None:
        """Replace a buffer by one of another size. The old one's memory is freed before the new one's is allocated; if
        that fails, the slot has no memory."""
        self._allocate(slot, 0)
        self._allocate(slot, nbytes)

    def remove(self, slot: int) -> None:
        """Free a buffer, once no tensor views it any more."""
        self._give_back(self._slots.pop(slot).memory)

    def _allocate(self, slot: int, nbytes: int) -> None:
        if slot in self._slots:
            self._give_back(self._slots[slot].memory)
        self._slots[slot] = _Buffer(self._take(nbytes), {})

    def _take(self, nbytes: int) -> Tensor:
        if self._pages is not None and nbytes:
            return self._pages.take(nbytes)
        with torch.inference_mode(False):  # slots outlive an inference-mode block that may be open
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _give_back(self, memory: Tensor) -> None:
        if self._pages is not None and memory.nbytes:
            self._pages.give_back(memory)

    def record(self, slot: int) -> Tensor:
        """A slot's bytes, uint8."""
        return self._slots[slot].memory

    def views(self, slot: int, layout: RecordLayout) -> Weights:
        """A slot seen as one expert. Valid until the slot is given to another expert; made once per slot."""
        memory, seen = self._slots[slot]
        views = seen.get(layout)
        if views is None:
            with torch.inference_mode(False):  # a model that generates now may be trained later
                views = seen[layout] = layout.views(memory)
        return views


class _Buffer(NamedTuple):
    memory: Tensor
    views: dict[RecordLayout, Weights]
    """The views that were made so far."""


class CopiedSlots:
    """Slots that are buffers, filled by a copier."""

    lost = None
    sure_for = math.inf
    are_files_unchanged = None

    def __init__(self, store: ExpertStore, pool: SlotPool, copier: Copier) -> None:
        self.pool = pool
        self._store = store
        self._copier = copier
        self.retire = self._retire if copier.is_asynchronous else None
        self.weights: dict[int, Weights] = {}

    @property
    def num_lanes(self) -> int:
        """What the copier can carry at once."""
        return self._copier.num_lanes

    def add(self, slot: int) -> None:
        """Allocate a buffer; its memory may have been another tensor's, which kernels in flight still read."""
        self.pool.add(slot)
        self._copier.retire(self.pool.record(slot))

    def remove(self, slot: int) -> None:
        """Free a buffer."""
        self._copier.retire(self.pool.record(slot))
        self.weights.pop(slot, None)
        self.pool.remove(slot)

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> Transfer:
        """Begin to fill the slot's buffer."""
        layout = self._store.layout(*expert)
        if self.pool.record(slot).nbytes != layout.nbytes:
            self.pool.fit(slot, layout.nbytes)
            self._copier.retire(self.pool.record(slot))  # its memory may be another tensor's that kernels still read
        self.weights[slot] = self.pool.views(slot, layout)
        return self._copier.start(expert, self.pool.record(slot), alongside)

    def give_back(self) -> None:
        """Nothing to do: evicted experts are overwritten."""

    def start_over(self, held: Mapping[int, ExpertId]) -> None:
        """Wait for the copier; only the cache knows which expert is in which slot."""
        self._copier.drain()

    def device_bytes(self, expert: ExpertId) -> int:
        """The record, where the buffer is not in host memory."""
        return 0 if self.pool.device.type == "cpu" else self._store.layout(*expert).nbytes

    def _retire(self, slots: Sequence[int]) -> None:
        """The next copies into these buffers come after the kernels that read them now."""
        for slot in slots:
            self._copier.retire(self.pool.record(slot))
