"""The fast tier of a CPU machine with memory to spare: experts where they are, in the page cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.memory.checkpoint import ExpertStore
from transformers_moe_offload.memory.field_source import Stretch, joined
from transformers_moe_offload.memory.mapping import FileMap
from transformers_moe_offload.memory.record import torch_dtype
from transformers_moe_offload.memory.slots import Weights
from transformers_moe_offload.memory.transfer import Landed, Read, Transfer


class MappedSlots:
    """Slots that stand for mapped pages: bringing an expert in maps its pages and reads those that are not cached.

    What leaves stays mapped until its slot is given up: the memory is the page cache's, and the kernel takes it back
    when it is needed. So an expert that comes back is there at once, as a rule. One that does not lie in the files as
    it should lie in memory is copied instead.
    """

    def __init__(self, store: ExpertStore, workers: int) -> None:
        self.num_lanes = workers
        self._store = store
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="moe-offload-read")
        self._experts: dict[ExpertId, _MappedExpert] = {}
        self._inside: dict[int, _MappedExpert] = {}

    def add(self, slot: int) -> None:
        """Nothing is allocated."""

    def remove(self, slot: int) -> None:
        """Unmap whoever is there."""
        if slot in self._inside:
            self._inside.pop(slot).let_go()

    def start(self, expert: ExpertId, slot: int) -> Transfer:
        """Begin to map an expert."""
        if slot in self._inside:
            self._inside[slot].leave()
        coming = self._inside[slot] = self._experts.setdefault(expert, _MappedExpert(self._store, expert))
        if coming.is_there():
            return Landed(coming.from_files)
        return Read(self._pool, coming.bring_in)

    def retire(self, slot: int) -> None:
        """Nothing to do: CPU kernels have finished when they return."""

    def weights(self, expert: ExpertId, slot: int) -> Weights:
        """The expert's tensors inside the mapped files."""
        return self._inside[slot].weights

    def holds(self, slot: int) -> bool:
        """Whether the kernel has not taken pages back meanwhile, and nobody has cut the file short."""
        return self._inside[slot].is_there()

    def device_bytes(self, expert: ExpertId) -> int:
        """There is no accelerator."""
        return 0


class _MappedExpert:
    """One expert's place in the page cache."""

    def __init__(self, store: ExpertStore, expert: ExpertId) -> None:
        self.weights: Weights = {}
        self.from_files = store.stored_bytes(expert)
        self._store = store
        self._expert = expert
        self._maps: list[FileMap] = []
        self._stretches: list[Stretch] = []

    def is_there(self) -> bool:
        """Whether it has come in, its pages are still in memory, and the files as long as they were."""
        return bool(self.weights) and all(
            map.is_whole() and map.is_cached(stretch.start, stretch.stop)
            for map, stretch in zip(self._maps, self._stretches, strict=True)
        )

    def bring_in(self) -> int:
        """Map the expert's pages, or read a copy of it; returns the bytes of the files that are used."""
        self.weights = {}
        layout, stretches = self._store.layout(*self._expert), self._store.stretches(self._expert)
        with torch.inference_mode(False):  # kept for later, whatever block happens to be open
            if stretches is None:
                record = torch.empty(layout.nbytes, dtype=torch.uint8)
                self._store.read_into(self._expert, record)
                self.weights = layout.views(record)
                return self.from_files
            self._stretches = joined(stretches)
            self._maps = [stretch.file.mapped() for stretch in self._stretches]
            for map, stretch in zip(self._maps, self._stretches, strict=True):
                map.bring_in(stretch.start, stretch.stop)
            if len(self._stretches) == 1:
                place = self._stretches[0]
                self._store.check(self._expert, self._maps[0].bytes[place.start : place.stop])
            self.weights = {
                field.name: part.file.mapped()
                .bytes[part.start : part.start + field.nbytes]
                .view(torch_dtype(field.dtype))
                .view(field.shape)
                for field, part in zip(layout.fields, stretches, strict=True)
            }
        return self.from_files

    def leave(self) -> None:
        """Make room: a copy is dropped, and pages are the kernel's to take."""
        if not self._maps:
            self.weights = {}

    def let_go(self) -> None:
        """Unmap the pages."""
        for map, stretch in zip(self._maps, self._stretches, strict=True):
            map.let_go(stretch.start, stretch.stop)
        self.weights = {}
