"""What the engine needs of a device's streams: one that computes, one that copies beside it, and marks to wait for.

`Streams` are a CPU's, where everything has happened when the call returns. Tests have streams of their own, that
do what is queued as late and in as odd an order as the marks allow (`tests/device_decode/streams.py`).

The compute stream is torch's current one. Threads that share a model have to share it, as they do by default.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in the work of a stream."""

    def is_done(self) -> bool:
        """Whether the stream has reached it."""

    def wait(self) -> None:
        """Block the host until the stream has reached it."""


class Copy(Mark, Protocol):
    """One copy, and its end."""

    @property
    def seconds(self) -> float | None:
        """How long the copy took, without what it waited for; None until that is known."""


class Streams:
    """A device's compute stream, and one more that copies. These are a CPU's: queued work is done at once."""

    def compute(self, work: Callable[[], Any]) -> None:
        """Queue work that does nothing but torch operations on the device, on the compute stream."""
        work()  # on a GPU, torch queues its operations by itself

    def mark(self) -> Mark:
        """This point of the compute stream."""
        return _Done(None)

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Mark]) -> Copy:
        """Queue a copy on the other stream, for when these marks have been reached."""
        began = time.perf_counter()
        target.copy_(source)
        return _Done(time.perf_counter() - began)

    def join(self, copy: Copy) -> None:
        """Work queued on the compute stream from now on comes after the copy."""

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device can write to while the host does other things."""
        return torch.empty(tuple(shape), dtype=dtype)

    def is_capturing(self) -> bool:
        """Whether queued work is captured in a graph, to be replayed later, and not done; a CPU has no graphs."""
        return False

    def synchronize(self) -> None:
        """Block the host until everything is done."""


class _Done:
    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class CudaStreams(Streams):
    """Streams of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def mark(self) -> Mark:
        """An event on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return _CudaMark(event)

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Mark]) -> Copy:
        """A copy between two events, which tell how long it took."""
        with torch.cuda.stream(self._copies):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for mark in after:
                assert isinstance(mark, _CudaMark)
                self._copies.wait_event(mark.event)
            began.record(self._copies)
            target.copy_(source, non_blocking=True)  # copy: host -> device, async
            target.record_stream(self._copies)  # if the target is freed now, its memory waits for the copy
            ended.record(self._copies)
        return _CudaCopy(began, ended)

    def join(self, copy: Copy) -> None:
        """Let the current stream wait for the event at the copy's end."""
        assert isinstance(copy, _CudaMark)
        torch.cuda.current_stream(self._device).wait_event(copy.event)

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Page-locked memory."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return bool(torch.cuda.is_current_stream_capturing())

    def synchronize(self) -> None:
        """Wait for all streams of the GPU."""
        torch.cuda.synchronize(self._device)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def is_done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()  # sync: device -> host


class _CudaCopy(_CudaMark):
    def __init__(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        super().__init__(ended)
        self._began = began

    @property
    def seconds(self) -> float | None:
        return self._began.elapsed_time(self.event) / 1e3 if self.event.query() else None


def streams_of(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else Streams()
