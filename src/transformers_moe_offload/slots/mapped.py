"""The fast tier of a CPU machine with memory to spare: experts where they are, in the page cache."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence

import torch

from transformers_moe_offload.disk_io.file import FileRange, joined
from transformers_moe_offload.disk_io.mapped_file import MappedFile
from transformers_moe_offload.disk_io.opened_file import LOOK_EVERY
from transformers_moe_offload.disk_io.read import Work
from transformers_moe_offload.disk_io.reader_pool import ReaderPool
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.transfer import Landed, Transfer
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import Weights

_SURELY_THERE = 1.0
"""Seconds after its last use for which an expert's pages are not looked at. A look at an expert of 3 MiB takes 15 us.
Pages that were used so shortly before are the last ones that the kernel takes, and it hardly has to take any: experts
are mapped where there is RAM to spare."""


class MappedSlots:
    """Slots that stand for mapped pages: loading an expert maps its pages and reads those that are not cached.

    An evicted expert stays mapped until its slot is removed or `give_back` is called: the memory is the page cache's,
    and the kernel takes it back when it is needed. So an expert that is loaded again is there at once, as a rule. An
    expert that is not stored as it is used is copied instead.
    """

    retire = None
    sure_for = _SURELY_THERE

    def __init__(self, store: ExpertStore, workers: int) -> None:
        self.num_lanes = workers
        self._store = store
        self._lanes = ReaderPool(workers)
        self._experts: dict[ExpertId, _MappedExpert] = {}
        self._inside: dict[int, _MappedExpert] = {}
        self.weights: dict[int, Weights] = {}
        self._replaced: set[_MappedExpert] = set()
        """Experts that were replaced since the last `give_back`; some may have been loaded again."""
        self._look_again = -math.inf
        """Until when all files were unchanged."""

    def add(self, slot: int) -> None:
        """Nothing is allocated."""

    def remove(self, slot: int) -> None:
        """Unmap the expert in the slot."""
        self.weights.pop(slot, None)
        left = self._inside.pop(slot, None)
        if left is not None and left not in self._inside.values():
            left.unmap()

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> Transfer:
        """Begin to map an expert, in one go: all of its pages are announced to the kernel at once anyway."""
        left = self._inside.pop(slot, None)
        if left is not None:
            self._replaced.add(left)
            if left.is_copy and left not in self._inside.values():
                left.forget_weights()
        coming = self._inside[slot] = self._mapped(expert)
        self.weights[slot] = coming.weights
        now = time.monotonic()
        if coming.look(now, [map for map in coming.files if not map.is_unchanged(now)]):
            return Landed(coming.from_files)
        return self._lanes.start(Work((), coming.bring_in))

    def _mapped(self, expert: ExpertId) -> _MappedExpert:
        found = self._experts.get(expert)
        if found is None:
            found = self._experts[expert] = _MappedExpert(self._store, expert)
        return found

    def lost(self, slots: Sequence[int]) -> Sequence[int]:
        """The slots of experts whose pages are not in memory any more, or whose files have changed."""
        now = time.monotonic()
        held = [self._inside[slot] for slot in slots]
        changed = [map for map in set().union(*[one.files for one in held]) if not map.is_unchanged(now)]
        lost = []
        for slot, one in zip(slots, held, strict=True):
            if now < one.surely_there_until and not changed:  # as `look` finds, without a call for each
                one.surely_there_until = now + _SURELY_THERE
            elif not one.look(now, changed):
                lost.append(slot)
        return lost

    def are_files_unchanged(self, now: float) -> bool:
        """Whether the files that experts are mapped from are what they were, as `lost` finds for some of them."""
        if now <= self._look_again:
            return True
        files = set().union(*[one.files for one in self._inside.values()])
        if not all(map.is_unchanged(now) for map in files):
            return False
        self._look_again = now + LOOK_EVERY
        return True

    def start_over(self, held: Mapping[int, ExpertId]) -> None:
        """Wait for the reader threads; a slot's mapping is replaced when its next load begins."""
        self._lanes.drain()

    def give_back(self) -> None:
        """Unmap evicted experts."""
        for expert in self._replaced.difference(self._inside.values()):
            expert.unmap()
        self._replaced.clear()

    def device_bytes(self, expert: ExpertId) -> int:
        """There is no accelerator."""
        return 0


class _MappedExpert:
    """One expert's place in the page cache."""

    def __init__(self, store: ExpertStore, expert: ExpertId) -> None:
        self.weights: Weights = {}
        """Tensors inside of the mapped files, or of a copy; empty until the expert is brought in."""
        self.from_files = store.stored_bytes(expert)
        self._store = store
        self._expert = expert
        self._pages: list[tuple[MappedFile, FileRange]] = []
        """Where it is mapped; empty if it is a copy."""
        self.files: tuple[MappedFile, ...] = ()
        """The files that it is in."""
        self.surely_there_until = -math.inf
        """Until when its pages are not looked at, in seconds of `time.monotonic`; only if it was brought in."""

    def look(self, now: float, changed: Collection[MappedFile]) -> bool:
        """Look whether it can be used: it has been loaded, is in none of the `changed` files, and is in memory.

        Touching a mapped page that its file has lost would end the process; a page that the kernel took back is only
        read again. Pages are not looked at if they were used, or seen, a moment before.
        """
        if not self.weights or (changed and any(map in changed for map in self.files)):
            return False
        if now >= self.surely_there_until and not all(map.is_cached(at.start, at.stop) for map, at in self._pages):
            return False
        self.surely_there_until = now + _SURELY_THERE
        return True

    def bring_in(self) -> int:
        """Map the expert's pages, or read a copy of it; returns the bytes of the files that are used."""
        self.forget_weights()
        layout, ranges = self._store.layout(*self._expert), self._store.file_ranges(self._expert)
        with torch.inference_mode(False):  # the weights outlive an inference-mode block that may be open
            if ranges is None:
                record = torch.empty(layout.nbytes, dtype=torch.uint8)
                self._store.read_into(self._expert, record)
                self.weights.update(layout.views(record))
                return self.from_files
            pages = self._pages = [(file_range.file.mapped(), file_range) for file_range in joined(ranges)]
            self.files = tuple(dict.fromkeys(map for map, _ in pages))
            for map, file_range in pages:
                map.bring_in(file_range.start, file_range.stop)
            if len(pages) == 1:
                map, place = pages[0]
                self._store.check(self._expert, map.bytes[place.start : place.stop])
            self.weights.update(
                {
                    field.name: part.file.mapped()
                    .bytes[part.start : part.start + field.nbytes]
                    .view(torch_dtype(field.dtype))
                    .view(field.shape)
                    for field, part in zip(layout.fields, ranges, strict=True)
                }
            )
        self.surely_there_until = time.monotonic() + _SURELY_THERE
        return self.from_files

    @property
    def is_copy(self) -> bool:
        """Whether it takes memory of its own, not pages that the kernel can take back."""
        return not self._pages

    def forget_weights(self) -> None:
        """Forget the tensors: it has to be brought in before it is used again."""
        self.weights.clear()
        self.surely_there_until = -math.inf

    def unmap(self) -> None:
        """Unmap the pages."""
        for map, file_range in self._pages:
            map.let_go(file_range.start, file_range.stop)
        self.forget_weights()
