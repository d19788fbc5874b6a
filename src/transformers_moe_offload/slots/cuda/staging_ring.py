"""The buffers that copies to a GPU start from: a ring of few, page-locked and capped.

A GPU reads page-locked memory at the full speed of the link while the host does other things; from pageable memory each
copy is made twice, and the host waits for it. But the system can neither swap page-locked memory nor give it to other
programs, so there is never more of it than `RING_BYTES`, however large an expert is: records larger than a buffer pass
through in chunks.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

RING_BYTES = 64 << 20
"""Page-locked memory for each GPU, at most. Not measured on a GPU: by arithmetic, see `BUFFER_BYTES`."""

BUFFER_BYTES = 4 << 20
"""Bytes of the largest buffer. At 25 GB/s of a link it takes 0.17 ms to drain, next to which the 0.01 ms that it takes
to launch a copy are little; eight of them, two for each of four readers, are half of what the ring may have."""

LEAST_BYTES = 256 << 10
"""Smaller buffers would spend more time on launching than on copying; with very many readers, some wait instead."""


@dataclass(frozen=True)
class RingShape:
    """How many buffers of what size."""

    count: int
    buffer_bytes: int
    """A power of two: torch's allocator of page-locked memory takes that much anyway."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.count * self.buffer_bytes


def ring_shape(record_bytes: int, num_lanes: int) -> RingShape:
    """Buffers for records of a size and so many readers: one being filled and one being drained for each."""
    count = min(2 * num_lanes, RING_BYTES // LEAST_BYTES)
    share = 1 << (RING_BYTES // count).bit_length() - 1
    return RingShape(count, min(1 << (record_bytes - 1).bit_length(), BUFFER_BYTES, share))


@dataclass(frozen=True)
class Buffer:
    """Memory of the ring, and how far the copies out of it have got."""

    memory: Tensor
    """uint8 (buffer_bytes,), in host memory."""
    drained: torch.cuda.Event


class StagingRing:
    """Buffers that are filled by readers and drained by a copy stream, in turn."""

    def __init__(self, shape: RingShape, pin_memory: bool) -> None:
        self.shape = shape
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        for memory in _allocated(shape, pin_memory):
            self._free.put(Buffer(memory, torch.cuda.Event()))

    @contextmanager
    def buffer(self) -> Iterator[Buffer]:
        """A buffer whose copies have ended; the caller records in `drained` the copies that it starts from it."""
        buffer = self._free.get()
        try:
            buffer.drained.synchronize()
            yield buffer
        finally:
            self._free.put(buffer)


def _allocated(shape: RingShape, pin_memory: bool) -> list[Tensor]:
    """All buffers; pageable ones where the system grants no page-locked memory."""
    if pin_memory:
        try:
            return [torch.empty(shape.buffer_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(shape.count)]
        except RuntimeError as error:
            logger.warning(
                f"the system did not grant {shape.nbytes:,} bytes of page-locked memory "
                f"({str(error).splitlines()[0]}); copies to the GPU start from pageable memory, "
                f"which is slower. OffloadConfig(pin_memory=False) asks "
                f"for that"
            )
    return [torch.empty(shape.buffer_bytes, dtype=torch.uint8) for _ in range(shape.count)]
