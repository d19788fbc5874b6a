"""All experts of some layers in host memory that the device reads where it is; filled once, and never changed.

On a GPU it is page-locked, so it is asked for in blocks: a refusal comes before anything is read, and says how far the
system went. On a CPU it is memory like any other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.memory.checkpoint import ExpertStore
from transformers_moe_offload.memory.page_locked import PageableBlock, PageLockedBlock, why_not_readable
from transformers_moe_offload.memory.record import RecordLayout
from transformers_moe_offload.memory.transfer import HostCopier, Transfer

BLOCK_BYTES = 1 << 30
"""Of one block, unless a record is larger. Locking pages takes the system about a second for each GiB, in which nothing
else of the process is interrupted by more than one block."""


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

        `advance` is called with the bytes of each record that is there. Raises `ConfigError` if the experts take more
        than `budget_bytes`, or the system does not grant them, and what the store raises for files that are missing,
        short or not what they were; then nothing is kept.
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
        self._blocks: list[PageLockedBlock | PageableBlock] = []
        self._records: dict[ExpertId, Tensor] = {}
        try:
            self._take(experts)
            self._read(experts, workers, advance)
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
        while self._blocks:
            self._blocks.pop().free()

    def _take(self, experts: Sequence[ExpertId]) -> None:
        """Memory for all records, before any is read."""
        reason = why_not_readable(self._device) if self._device.type == "cuda" else None
        granted = 0
        for members in self._in_blocks(experts):
            nbytes = sum(self.layout(expert).nbytes for expert in members)
            try:
                if reason is not None:
                    raise OSError(reason)  # noqa: TRY301
                block = PageLockedBlock(nbytes) if self._device.type == "cuda" else PageableBlock(nbytes)
            except OSError as error:
                raise ConfigError(
                    f"decoding on {self._device} needs {self.nbytes:,} bytes of page-locked memory for all experts, of "
                    f"which the system granted {granted:,} ({error}); `ulimit -l` shows one limit. Use decode='host', "
                    f"or fewer bits for experts"
                ) from error
            self._blocks.append(block)
            granted += nbytes
            start = 0
            for expert in members:
                stop = start + self.layout(expert).nbytes
                self._records[expert] = block.memory[start:stop]
                start = stop

    def _in_blocks(self, experts: Sequence[ExpertId]) -> Iterator[list[ExpertId]]:
        members: list[ExpertId] = []
        nbytes = 0
        for expert in experts:
            more = self.layout(expert).nbytes
            if members and nbytes + more > BLOCK_BYTES:
                yield members
                members, nbytes = [], 0
            members.append(expert)
            nbytes += more
        if members:
            yield members

    def _read(self, experts: Sequence[ExpertId], workers: int, advance: Callable[[int], object]) -> None:
        """Fill the records, a few at a time; when one fails, nobody writes into the memory any more."""
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
