"""Record the work that a call submits to a device, and submit it again without running the call.

`CudaGraph` does that on GPUs. On other devices `RerunGraph` runs the call again, and raises for operations that a CUDA
graph cannot capture. The caller must keep the buffers that a call reads at their addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from transformers_moe_offload.hf.cuda_graphs.no_host_sync import without_host


class Graph(Protocol):
    """A recorded call."""

    def capture(self, call: Callable[[], Any], written: Sequence[Tensor]) -> None:
        """Record the work that a call submits, without effect on `written`, the tensors that the call changes.

        Raises `RuntimeError` if it cannot be recorded, for instance because the call waits for a value.
        """

    def replay(self) -> Any:
        """Run the recorded work; returns the call's outputs, whose tensors the next replay overwrites."""


def as_recorded() -> TorchFunctionMode:
    """The context for warm-up calls before a capture: the same torch function mode as during the capture.

    Under another mode `torch.compile` would compile again during the capture, which cannot be recorded.
    """
    return _MadeOnDevice()


class CudaGraph:
    """A CUDA graph; the tensors that it reads and writes must keep their addresses."""

    _called_off: ClassVar[list[torch.cuda.CUDAGraph]] = []
    """Graphs whose capture has failed, kept alive: torch's allocator of page-locked memory keeps asking them whether
    they are capturing, and cannot be told to stop."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._outputs: Any = None

    def capture(self, call: Callable[[], Any], written: Sequence[Tensor]) -> None:
        """Run the call while its kernels are recorded instead of run."""
        # Other threads, which read files into page-locked memory, may continue during the capture.
        mode = "thread_local"
        failure: BaseException | None = None
        # The stream context restores the current stream: torch (`torch/cuda/graphs.py`, 2.13) leaves the capture stream
        # current if the end of a capture raises, as it does when CUDA has invalidated the capture.
        with torch.cuda.device(self._device), _MadeOnDevice(), torch.cuda.stream(torch.cuda.current_stream()):
            # By default torch uses one capture stream for the whole process, on the device that captured first.
            stream, pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode=mode):
                    try:
                        self._outputs = call()
                    except BaseException as error:
                        failure = error
                        raise
            except BaseException as end:
                self._give_up(pool)
                # The error of the call is more specific than the error at the end of the capture.
                raise (failure or end) from None
            finally:
                failure = None  # breaks the reference cycle between its traceback and this frame

    def _give_up(self, pool: Any) -> None:
        """Restore torch's allocators after a failed capture.

        If CUDA has invalidated the capture, torch (`CUDAGraph::capture_end`, 2.13) never tells them that it is over.
        From then on the allocator of GPU memory would not reclaim memory that another stream has used, and would refuse
        to empty its cache.
        """
        with suppress(RuntimeError):  # raised if torch has told the allocator already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        self._graph.reset()
        self._called_off.append(self._graph)

    def replay(self) -> Any:
        """Launch the graph on the current stream."""
        self._graph.replay()
        return self._outputs


class RerunGraph:
    """Replays a call on any device by running it again."""

    def __init__(self) -> None:
        self._call: Callable[[], Any] | None = None
        self._outputs: list[Any] | None = None

    def capture(self, call: Callable[[], Any], written: Sequence[Tensor]) -> None:
        """Run the call once, then restore `written`. Raises `HostSyncError` if a CUDA graph could not capture it."""
        before = [tensor.clone() for tensor in written]
        self._call = call
        try:
            self._run()
        finally:
            for tensor, was in zip(written, before, strict=True):
                tensor.copy_(was)

    def _run(self) -> Any:
        assert self._call is not None
        with without_host(), _MadeOnDevice():
            return self._call()

    def replay(self) -> Any:
        """Run the call, and copy its outputs into the tensors of the first replay."""
        found, structure = _pytree.tree_flatten(self._run())
        if self._outputs is None:
            self._outputs = found
        for kept, new in zip(self._outputs, found, strict=True):
            if isinstance(kept, Tensor) and kept is not new:
                kept.copy_(new)
        return _pytree.tree_unflatten(self._outputs, structure)


def graph_on(device: torch.device) -> Graph:
    """The kind of graph for a device."""
    return CudaGraph(device) if device.type == "cuda" else RerunGraph()


class _MadeOnDevice(TorchFunctionMode):
    """Fill small constants, `torch.tensor([-1], device=...)`, by kernels on the device.

    torch copies them from the host, which a graph cannot record. Transformers has one in the sliding layers of its
    static cache (`StaticSlidingWindowLayer.update` in `cache_utils.py`, 5.23).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.tensor and options.get("device") is not None and len(args) == 1:
            values = [args[0]] if isinstance(args[0], int | float) else args[0]
            if isinstance(values, list | tuple) and 0 < len(values) <= _FEW and all(map(_is_number, values)):
                kind = torch.tensor(values, dtype=options.get("dtype")).dtype  # on the host
                made = [torch.full((1,), value, dtype=kind, device=options["device"]) for value in values]
                return torch.cat(made).reshape(() if values is not args[0] else (len(values),))
        return func(*args, **options)


_FEW = 16
"""Most numbers in a constant: each takes a kernel, and the constants of a step are short."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
