"""Carry experts to a GPU: readers fill the buffers of a staging ring, and a copy stream takes them from there.

The compute stream waits for the copies through an event, the host does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.chunks import Chunk, Segment
from transformers_moe_offload.disk_io.read import Read, Work
from transformers_moe_offload.disk_io.reader_pool import ReaderPool, chunk_bytes
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.cuda.staging_ring import Buffer, StagingRing, ring_shape
from transformers_moe_offload.slots.transfer import Transfer
from transformers_moe_offload.store.record import Fill, OpenFill
from transformers_moe_offload.system.host_memory import copy_bytes, host_bytes


class CudaCopier:
    """Fills slots in GPU memory."""

    def __init__(self, fill: OpenFill, workers: int, device: torch.device, record_bytes: int, pin_memory: bool) -> None:
        self.num_lanes = workers
        self.is_asynchronous = True
        self._open = fill
        self._device = device
        self._lanes = ReaderPool(workers)
        self._ring = StagingRing(ring_shape(record_bytes, workers), pin_memory)
        self._stream = torch.cuda.Stream(device)
        # The slots' memory may have been another tensor's, which kernels in flight still read.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._last_use: dict[int, torch.cuda.Event] = {}

    def start(self, expert: ExpertId, slot: Tensor, alongside: int = 0) -> Transfer:
        """Begin to read an expert into staging buffers and to copy it on from there."""
        last_use = self._last_use.get(slot.data_ptr())  # kept: should this load fail, the next one waits
        most = self._ring.shape.buffer_bytes
        wanted = chunk_bytes(slot.numel(), self.num_lanes, alongside) or slot.numel()
        landed = torch.cuda.Event()

        def opened() -> Work:
            fill = self._open(expert, min(wanted, most))
            try:
                upload = _Upload(fill, slot, last_use, self._stream, self._ring)
            except BaseException:
                fill.give_up()
                raise

            def complete() -> int:
                from_files = upload.finish()
                landed.record(upload.stream)
                return from_files

            return Work([partial(upload.carry, chunk) for chunk in fill.chunks], complete, fill.give_up)

        return _Landing(self._lanes.open(opened), landed, self._device)

    def drain(self) -> None:
        """Wait until nothing writes into a slot any more."""
        self._lanes.drain()
        self._stream.synchronize()  # sync: host waits for device

    def retire(self, slot: Tensor) -> None:
        """Remember how far the compute stream has to get before the slot may be overwritten."""
        used = torch.cuda.Event()
        used.record(torch.cuda.current_stream(self._device))
        self._last_use[slot.data_ptr()] = used


class _Upload:
    """One expert in flight through a ring into a slot."""

    def __init__(
        self, fill: Fill, slot: Tensor, last_use: torch.cuda.Event | None, stream: torch.cuda.Stream, ring: StagingRing
    ) -> None:
        self.stream = stream
        self._fill = fill
        self._slot = slot
        self._last_use = last_use
        self._ring = ring
        self._record: Tensor | None = None
        most = ring.shape.buffer_bytes
        if fill.is_checked or any(chunk.nbytes > most or not chunk.is_verbatim for chunk in fill.chunks):
            self._record = torch.empty(slot.numel(), dtype=torch.uint8)

    def carry(self, chunk: Chunk) -> None:
        """Read a chunk and send it off: out of a staging buffer, or by way of a whole record where one is needed."""
        if self._record is None:
            with self._ring.buffer() as buffer:
                self._fill.read(chunk, chunk.one_by_one(host_bytes(buffer.memory)))
                self._send(buffer, chunk.segments)
            return
        raw = host_bytes(self._record)
        self._fill.read(chunk, chunk.inside(raw))
        for segment in chunk.segments:
            for part in segment.parts(self._ring.shape.buffer_bytes):
                with self._ring.buffer() as buffer:
                    copy_bytes(host_bytes(buffer.memory)[: part.nbytes], raw[part.start : part.stop])
                    self._send(buffer, (part,))

    def finish(self) -> int:
        """All copies are queued: returns the bytes that came from files, or raises what is wrong with them."""
        return self._fill.finish(self._record)

    def _send(self, buffer: Buffer, segments: Sequence[Segment]) -> None:
        """Queue the copies of segments that lie one after the other in a buffer."""
        with torch.cuda.stream(self.stream):
            if self._last_use is not None:
                self.stream.wait_event(self._last_use)
            begin = 0
            for start, stop in segments:
                end = begin + stop - start
                self._slot[start:stop].copy_(buffer.memory[begin:end], non_blocking=True)  # copy: host -> device, async
                begin = end
            self._slot.record_stream(self.stream)  # if the slot is freed now, its memory waits for the copy
            buffer.drained.record(self.stream)


class _Landing:
    """An expert that is read and sent off, and the copy to the GPU that follows on the copy stream."""

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
