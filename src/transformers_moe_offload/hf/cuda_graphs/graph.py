"""Record once what a call submits to a device, and submit it again without running the call.

`CudaGraph` does that on GPUs. `RerunGraph` stands in for it elsewhere: it runs the call again, and refuses what a CUDA
graph could not have captured. Which buffers a call reads, and whether they are still those, is the caller's to know.
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
    """One call, recorded."""

    def capture(self, call: Callable[[], Any], written: Sequence[Tensor]) -> None:
        """Record what a call submits, without computing any of it. `written` are tensors that it changes.

        Raises `RuntimeError` if it cannot be recorded, for instance because the call waits for a value.
        """

    def replay(self) -> Any:
        """Compute it all, and give back what the call returned: tensors that the next replay writes into again."""


def as_recorded() -> TorchFunctionMode:
    """Around a call that is computed before it is recorded, so that nothing is new to it then.

    `torch.compile` compiles again where another mode is in force, which cannot be recorded.
    """
    return _MadeOnDevice()


class CudaGraph:
    """A CUDA graph; what it reads and writes must stay where it is."""

    _called_off: ClassVar[list[torch.cuda.CUDAGraph]] = []
    """Those whose capture has failed: torch's allocator of page-locked memory, which cannot be told, goes on asking
    them whether it is theirs to capture."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._outputs: Any = None

    def capture(self, call: Callable[[], Any], written: Sequence[Tensor]) -> None:
        """Run the call while its kernels are recorded instead of computed."""
        # Other threads, which read files into page-locked memory, may go on meanwhile.
        mode = "thread_local"
        failure: BaseException | None = None
        # The current stream is opened as well: torch (`torch/cuda/graphs.py`, 2.13) leaves it at the one it captures on
        # where the end of a capture raises, as it does when CUDA has called the capture off.
        with torch.cuda.device(self._device), _MadeOnDevice(), torch.cuda.stream(torch.cuda.current_stream()):
            # torch keeps one stream to capture on for the whole process, on the device that was the first to.
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
                # What the call raised says more than that its capture could not be ended.
                raise (failure or end) from None
            finally:
                failure = None  # its traceback would keep this frame, and this frame it

    def _give_up(self, pool: Any) -> None:
        """Leave torch's allocators as they were before a capture that has failed.

        Where CUDA has called it off, torch (`CUDAGraph::capture_end`, 2.13) does not get to telling them that it is
        over. The one of the GPU's memory would take none back that another stream has used, and refuse to empty its
        cache, from then on.
        """
        with suppress(RuntimeError):  # torch has told it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        self._graph.reset()
        self._called_off.append(self._graph)

    def replay(self) -> Any:
        """Launch the graph on the current stream."""
        self._graph.replay()
        return self._outputs


class RerunGraph:
    """The same on any device, by running the call again and again."""

    def __init__(self) -> None:
        self._call: Callable[[], Any] | None = None
        self._outputs: list[Any] | None = None

    def capture(self, call: Callable[[], Any], written: Sequence[Tensor]) -> None:
        """Try whether a graph could have the call, `HostSyncError` if not, and take back what it has changed."""
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
        """Run it, and put what it returns where it was before."""
        found, structure = _pytree.tree_flatten(self._run())
        if self._outputs is None:
            self._outputs = found
        for kept, new in zip(self._outputs, found, strict=True):
            if isinstance(kept, Tensor) and kept is not new:
                kept.copy_(new)
        return _pytree.tree_unflatten(self._outputs, structure)


def graph_on(device: torch.device) -> Graph:
    """What records calls on a device."""
    return CudaGraph(device) if device.type == "cuda" else RerunGraph()


class _MadeOnDevice(TorchFunctionMode):
    """Small constants, `torch.tensor([-1], device=...)`, are written by the device itself.

    They would be copied from the host, which no graph can record. Transformers has one in the sliding layers of its
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
"""Numbers: each takes a kernel, and what is longer is no constant of a step."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
