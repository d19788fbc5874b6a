"""All experts of some layers in host memory, for zero-copy reads of the device; filled once, and never changed.

For a GPU it is page-locked, so it is asked for in blocks: a refusal comes before anything is read, and the error says
how many bytes were granted. For a CPU it is pageable. Experts that were quantized while the model was loaded are in RAM
already, and are read there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from transformers_moe_offload.errors import ConfigError, PageLockError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.cuda.page_locked import PageLock, pageable, why_not_readable
from transformers_moe_offload.slots.transfer import HostCopier, Transfer
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.ram_file import RamFile
from transformers_moe_offload.store.record import RecordLayout

BLOCK_BYTES = 1 << 30
"""Bytes of one block, unless a record is larger. The system has to find every page that it locks, and can only be
interrupted between two blocks."""


class Arena:
    """The records of all experts of some layers, each at an address that stays the same."""

    def __init__(
        self,
        store: ExpertStore,
        layers: Sequence[int],
        device: torch.device,
        *,
        budget_bytes: int | None = None,
        workers: int = 1,
        advance: Callable[[int], object] = lambda nbytes: None,
    ) -> None:
        """Takes the memory and reads every expert into it, by `workers` threads.

        `advance` is called with the bytes of each record that was read. Raises `ConfigError` if the experts take more
        than `budget_bytes`, `PageLockError` if the system does not grant them, and what the store raises for files that
        are missing, short or not what they were; then nothing is kept.
        """
        self._store = store
        self._device = device
        experts = [ExpertId(layer, e) for layer in layers for e in range(store.layers[layer].spec.num_experts)]
        self.nbytes = sum(self.layout(expert).nbytes for expert in experts)
        """Bytes of all records."""
        self.smallest = min(self.layout(expert).nbytes for expert in experts)
        """Bytes of the smallest record."""
        if budget_bytes is not None and self.nbytes > budget_bytes:
            raise ConfigError(
                f"decoding on {device} keeps all experts in page-locked memory, which takes {self.nbytes:,} bytes; "
                f"host_budget allows {budget_bytes:,}. Set OffloadConfig.host_budget to {self.nbytes:,} bytes or more, "
                f"or decode='host'"
            )
        reason = why_not_readable(device) if device.type == "cuda" else None
        if reason is not None:
            raise self._refused(0, reason)
        self._locks: list[PageLock] = []
        self._records: dict[ExpertId, Tensor] = {}
        try:
            self._take(experts)
            self._read([expert for expert in experts if store.in_ram(expert) is None], workers, advance)
        except BaseException:
            self.close()
            raise

    def record(self, expert: ExpertId) -> Tensor:
        """An expert's record, uint8 (nbytes,); read-only."""
        return self._records[expert]

    def layout(self, expert: ExpertId) -> RecordLayout:
        """Where in its record each of an expert's tensors is."""
        return self._store.layout(*expert)

    def addresses(self, layer: int) -> list[int]:
        """Where the device reads each expert of a layer."""
        num_experts = self._store.layers[layer].spec.num_experts
        return [self._records[ExpertId(layer, e)].data_ptr() for e in range(num_experts)]

    def close(self) -> None:
        """Give the memory back. The device must not be reading it any more."""
        self._records.clear()
        while self._locks:
            self._locks.pop().free()

    def _take(self, experts: Sequence[ExpertId]) -> None:
        """Allocate memory for all records, before any is read."""
        granted = 0
        for memory, starts in self._blocks(experts):
            try:
                if self._device.type == "cuda":
                    self._locks.append(PageLock(memory, self._device))
            except OSError as error:
                raise self._refused(granted, error) from error
            for expert, start in starts.items():
                self._records[expert] = memory[start : start + self.layout(expert).nbytes]
                granted += self.layout(expert).nbytes

    def _blocks(self, experts: Sequence[ExpertId]) -> Iterator[tuple[Tensor, dict[ExpertId, int]]]:
        """Pieces of memory, and where records begin in each: new blocks, then `RamFile`s that hold records already."""
        in_files: dict[RamFile, dict[ExpertId, int]] = {}
        block: dict[ExpertId, int] = {}
        end = 0
        for expert in experts:
            found = self._store.in_ram(expert)
            if found is not None:
                in_files.setdefault(found[0], {})[expert] = found[1]
                continue
            nbytes = self.layout(expert).nbytes
            if block and end + nbytes > BLOCK_BYTES:
                yield pageable(end), block
                block, end = {}, 0
            block[expert] = end
            end += nbytes
        if block:
            yield pageable(end), block
        for file, starts in in_files.items():
            yield file.shared(), starts

    def _refused(self, granted: int, why: object) -> PageLockError:
        return PageLockError(
            f"decoding on {self._device} needs {self.nbytes:,} bytes of page-locked memory for all experts, of which "
            f"the system granted {granted:,} ({why}); it takes that much free RAM, and Windows and WSL grant half of "
            f"it. Use decode='host', or fewer bits for experts"
        )

    def _read(self, experts: Sequence[ExpertId], workers: int, advance: Callable[[int], object]) -> None:
        """Fill the records, a few at a time. If one fails, its error is raised once no thread writes to the memory."""
        copier = HostCopier(self._store.fill, workers)
        under_way: deque[tuple[ExpertId, Transfer]] = deque()

        def finish_first() -> None:
            expert, transfer = under_way[0]
            transfer.finish()
            under_way.popleft()
            advance(self._records[expert].nbytes)

        try:
            for expert in experts:
                under_way.append((expert, copier.start(expert, self._records[expert], alongside=workers)))
                if len(under_way) > 2 * workers:
                    finish_first()
            while under_way:
                finish_first()
        except BaseException:
            for _, transfer in under_way:
                if not transfer.cancel():
                    with suppress(Exception):
                        transfer.finish()
            raise
