"""Carry experts into slots, in the background.

A `Copier` starts a transfer and hands back a `Transfer` to wait on. On a CPU machine a reader thread fills the slot
directly from the file. For a GPU it fills a staging buffer (page-locked, if asked for), and a copy stream of its own
takes it from there; the compute stream waits for the copy through an event, the host does not.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from transformers_moe_offload.expert import ExpertId

ReadInto = Callable[[ExpertId, Tensor], int]
"""Fills a record in host memory with an expert and returns the bytes read from files, e.g. `ExpertStore.read_into`."""


class Transfer(Protocol):
    """One expert on its way into one slot."""

    @property
    def seconds(self) -> float:
        """How long the way was, without the time in the queue; 0 before the end."""

    def is_done(self) -> bool:
        """Whether `finish` would return at once."""

    def finish(self) -> int:
        """Make the slot usable by what the caller computes next and return the bytes that came from files, or raise
        what went wrong on the way."""

    def cancel(self) -> bool:
        """Give up a transfer that has not begun; returns whether it had not."""


class Copier(Protocol):
    """Moves experts into slots."""

    num_lanes: int
    """Experts that can be on their way at once."""

    def start(self, expert: ExpertId, slot: Tensor) -> Transfer:
        """Begin to fill a slot, (nbytes,) uint8. Its previous content may be in use until `retire` was called."""

    def retire(self, slot: Tensor) -> None:
        """Everything that reads this slot has been submitted; whatever is copied into it next comes after that."""


def default_workers() -> int:
    """Reader threads where the user names no number: one per core, at most four.

    Four saturate what one NVMe drive gives to reads of several MiB; Transformers' own loader settled on the same.
    """
    return min(4, os.cpu_count() or 1)


class Read:
    """A read that a thread of the pool does, or, if none got to it yet, whoever waits for it."""

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[[], int]) -> None:
        self.seconds = 0.0
        self._work = work
        self._future: Future[int] = pool.submit(self._run)

    def _run(self) -> int:
        began = time.perf_counter()
        from_files = self._work()
        self.seconds = time.perf_counter() - began
        return from_files

    def is_done(self) -> bool:
        """Whether the read is over."""
        return self._future.done()

    def finish(self) -> int:
        """Wait for the read, or do it here: waiting costs a thread switch, so what has not begun is not waited for."""
        return self._run() if self._future.cancel() else self._future.result()

    def cancel(self) -> bool:
        """Give the read up if it has not begun."""
        return self._future.cancel()


class Landed:
    """A transfer that was over when it began."""

    seconds = 0.0

    def __init__(self, from_files: int) -> None:
        self._from_files = from_files

    def is_done(self) -> bool:
        """It is."""
        return True

    def finish(self) -> int:
        """The bytes of the files that are used."""
        return self._from_files

    def cancel(self) -> bool:
        """Too late."""
        return False


class HostCopier:
    """Fills slots in host memory."""

    def __init__(self, read: ReadInto, workers: int) -> None:
        self.num_lanes = workers
        self._read = read
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="moe-offload-read")

    def start(self, expert: ExpertId, slot: Tensor) -> Transfer:
        """Begin to read an expert straight into its slot."""
        read = self._read
        return Read(self._pool, lambda: read(expert, slot))

    def retire(self, slot: Tensor) -> None:
        """Nothing to do: CPU kernels have finished when they return."""


class CudaCopier:
    """Fills slots in GPU memory through a few staging buffers and one copy stream."""

    def __init__(self, read: ReadInto, workers: int, device: torch.device, record_bytes: int, pin_memory: bool) -> None:
        self.num_lanes = workers
        self._read = read
        self._device = device
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="moe-offload-read")
        self._stream = torch.cuda.Stream(device)
        # The slots' memory may have been another tensor's, which kernels under way still read.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._last_use: dict[int, torch.cuda.Event] = {}
        self._staging: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        # One buffer being filled and one being copied per reader.
        for _ in range(2 * workers):
            buffer = torch.empty(record_bytes, dtype=torch.uint8, pin_memory=pin_memory)
            self._staging.put((buffer, torch.cuda.Event()))

    def start(self, expert: ExpertId, slot: Tensor) -> Transfer:
        """Begin to read an expert into a staging buffer and to copy it on from there."""
        last_use = self._last_use.get(slot.data_ptr())  # kept: should this load fail, the next one waits
        landed = torch.cuda.Event()
        read, stream, staging = self._read, self._stream, self._staging

        def work() -> int:
            buffer, drained = staging.get()
            try:
                drained.synchronize()
                from_files = read(expert, buffer[: slot.numel()])
                with torch.cuda.stream(stream):
                    if last_use is not None:
                        stream.wait_event(last_use)
                    slot.copy_(buffer[: slot.numel()], non_blocking=True)  # copy: host -> device, async
                    slot.record_stream(stream)  # whoever drops the slot now, its memory waits for the copy
                    drained.record(stream)
                    landed.record(stream)
                return from_files
            finally:
                staging.put((buffer, drained))

        return _Upload(Read(self._pool, work), landed, self._device)

    def retire(self, slot: Tensor) -> None:
        """Remember how far the compute stream has to get before the slot may be overwritten."""
        used = torch.cuda.Event()
        used.record(torch.cuda.current_stream(self._device))
        self._last_use[slot.data_ptr()] = used


class _Upload:
    """A read, and the copy to the GPU that follows it on the copy stream."""

    def __init__(self, read: Read, landed: torch.cuda.Event, device: torch.device) -> None:
        self._read = read
        self._landed = landed
        self._device = device

    @property
    def seconds(self) -> float:
        return self._read.seconds

    def is_done(self) -> bool:
        return self._read.is_done()

    def finish(self) -> int:
        from_files = self._read.finish()
        torch.cuda.current_stream(self._device).wait_event(self._landed)
        return from_files

    def cancel(self) -> bool:
        return self._read.cancel()


class FakeCopier:
    """Moves nothing and remembers what it was asked; a transfer is finished when somebody waits for it."""

    num_lanes = 1

    def __init__(self) -> None:
        self.started: list[ExpertId] = []
        self.fail_on: set[ExpertId] = set()
        """Experts whose transfer raises `OSError` when waited for."""

    def start(self, expert: ExpertId, slot: Tensor) -> Transfer:
        """Note the request."""
        self.started.append(expert)
        return _FakeTransfer(expert in self.fail_on)

    def retire(self, slot: Tensor) -> None:
        """Nothing reads the slot."""


class _FakeTransfer:
    seconds = 0.0

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def is_done(self) -> bool:
        return True

    def finish(self) -> int:
        if self._fails:
            raise OSError("the transfer was told to fail")
        return 0

    def cancel(self) -> bool:
        return False
