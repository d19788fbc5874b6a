"""The fast tier of a CPU machine with memory to spare: experts where they are, in the page cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.memory.checkpoint import ExpertStore
from transformers_moe_offload.memory.mapping import FileMap
from transformers_moe_offload.memory.record import torch_dtype
from transformers_moe_offload.memory.slots import Weights
from transformers_moe_offload.memory.transfer import Read, Transfer


class _Window(NamedTuple):
    """Part of a mapped file."""

    map: FileMap
    start: int
    stop: int


class MappedSlots:
    """Slots that stand for mapped pages: bringing an expert in maps its pages, and letting it go unmaps them.

    So the process holds no more of the files than the slots allow, while the page cache may hold all of them. An expert
    that does not lie in the files as it should lie in memory is copied instead.
    """

    def __init__(self, store: ExpertStore, workers: int) -> None:
        self.num_lanes = workers
        self._store = store
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="moe-offload-read")
        self._inside: dict[int, _Inside] = {}

    def add(self, slot: int) -> None:
        """Nothing is allocated."""
        self._inside[slot] = _Inside()

    def remove(self, slot: int) -> None:
        """Unmap whoever is there."""
        self._inside.pop(slot).let_go()

    def start(self, expert: ExpertId, slot: int) -> Transfer:
        """Begin to map an expert, and to unmap whoever was there."""
        coming = self._inside[slot] = _Inside(before=self._inside[slot])
        return Read(self._pool, lambda: coming.bring_in(self._store, expert))

    def retire(self, slot: int) -> None:
        """Nothing to do: CPU kernels have finished when they return."""

    def weights(self, expert: ExpertId, slot: int) -> Weights:
        """The expert's tensors inside the mapped files.

        A file that was cut short since is mapped anew if it is back, and raises `CheckpointError` otherwise.
        """
        inside = self._inside[slot]
        if not inside.is_whole():
            inside.bring_in(self._store, expert)
        return inside.weights

    def device_bytes(self, expert: ExpertId) -> int:
        """There is no accelerator."""
        return 0


class _Inside:
    """Whoever is in a slot, or on the way there."""

    def __init__(self, before: _Inside | None = None) -> None:
        """`before` is in the slot until this one comes, which it may never do: a load can be cancelled."""
        self.weights: Weights = {}
        self._windows: list[_Window] = []
        self._before = before

    def is_whole(self) -> bool:
        """Whether the expert is there, and the files it is mapped from, too."""
        return bool(self.weights) and all(window.map.is_whole() for window in self._windows)

    def bring_in(self, store: ExpertStore, expert: ExpertId) -> int:
        """Map the expert's pages, or read a copy of it; returns the bytes of the files that are used."""
        self.let_go()
        layout, stretches = store.layout(expert.layer), store.stretches(expert)
        with torch.inference_mode(False):  # kept for later, whatever block happens to be open
            if stretches is None:
                record = torch.empty(layout.nbytes, dtype=torch.uint8)
                nbytes = store.read_into(expert, record)
                self.weights = layout.views(record)
                return nbytes
            windows = [_Window(part.file.mapped(), part.start, part.stop) for part in stretches]
            for window in windows:
                window.map.bring_in(window.start, window.stop)
            self.weights = {
                field.name: window.map.bytes[window.start : window.stop]
                .view(torch_dtype(field.dtype))
                .view(field.shape)
                for field, window in zip(layout.fields, windows, strict=True)
            }
        self._windows = windows
        return sum(window.stop - window.start for window in windows)

    def let_go(self) -> None:
        """Unmap the pages, also those of whoever was there before."""
        if self._before is not None:
            self._before.let_go()
            self._before = None
        for window in self._windows:
            window.map.let_go(window.start, window.stop)
        self.weights, self._windows = {}, []
