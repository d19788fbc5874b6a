"""A recorded call gives what the call gives, and nothing in it waits for the device."""

from contextlib import nullcontext

import pytest
import torch

from transformers_moe_offload.hf.cuda_graphs.graph import CudaGraph, RerunGraph
from transformers_moe_offload.hf.cuda_graphs.no_host_sync import HostSyncError, without_host

X = torch.arange(4.0)

WAITING = {
    "item": lambda: X[0].item(),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "bool": lambda: bool(X[0]),
    "int": lambda: int(X[0]),
    "an index in Python": lambda: ["a", "b"][X[1].long()],
    "a format": lambda: f"{X[0]}",
    "a mask": lambda: X[X > 1],
    "a mask that is written to": lambda: X.clone().__setitem__(X > 1, 0.0),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 1),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "unique": lambda: X.unique(),
    "repeat_interleave": lambda: X.repeat_interleave(X.long()),
    "bincount": lambda: X.long().bincount(),
    "all, in an if": lambda: 1 if (X > 1).all() else 2,
}


@pytest.mark.parametrize("name", WAITING)
def test_what_would_wait_for_a_device_is_refused_on_a_cpu(name):
    WAITING[name]()
    with pytest.raises(HostSyncError), without_host():
        WAITING[name]()


def test_what_does_not_wait_is_let_through():
    with without_host():
        y = X[X.long()] + X.sum() * torch.where(X > 1, X, 0.0)
        y.index_copy_(0, torch.tensor([1]), X[:1]).scatter_(0, X.long(), X)
    assert y.shape == X.shape


def test_a_replay_reads_and_writes_where_the_call_did():
    given, written = torch.zeros(3), torch.zeros(3)

    def call():
        written.add_(1)
        return {"sum": given + written, "name": "kept"}

    graph = RerunGraph()
    graph.capture(call, [written])
    assert written.tolist() == [0, 0, 0]
    first = graph.replay()
    assert first["sum"].tolist() == [1, 1, 1]
    given.fill_(10)
    second = graph.replay()
    assert second["sum"].tolist() == [12, 12, 12]
    assert second["sum"] is first["sum"]
    assert second["name"] == "kept"


def test_a_call_that_waits_is_not_recorded_and_leaves_nothing_behind():
    written = torch.zeros(3)

    def call():
        return written.add_(1).sum().item()

    with pytest.raises(HostSyncError, match="_local_scalar_dense"):
        RerunGraph().capture(call, [written])
    assert written.tolist() == [0, 0, 0]


def test_small_constants_are_made_where_they_are_used():
    made = []

    def call():
        made[:] = [
            torch.tensor([-1], dtype=int, device="cpu"),
            torch.tensor(2.5, device="cpu"),
            torch.tensor([1, 2], device="cpu"),
            torch.tensor([True], device="cpu"),
            torch.tensor([[1, 2], [3, 4]], device="cpu"),
        ]

    graph = RerunGraph()
    graph.capture(call, [])
    graph.replay()
    plain = list(made)
    call()
    for constant, expected in zip(plain, made, strict=True):
        assert torch.equal(constant, expected)
        assert constant.dtype == expected.dtype
        assert constant.shape == expected.shape


class Cuda:
    """Of CUDA and torch's part of it written in C++, what a capture has to do with; torch's own Python is between."""

    def __init__(self, monkeypatch):
        self.streams = ["the current stream"]
        self.pools = set()
        self.is_called_off = False
        for name, value in {
            "device": lambda device: nullcontext(),
            "current_device": lambda: 0,
            "current_stream": lambda: self.streams[-1],
            "stream": lambda stream: Opened(self, stream),
            "Stream": lambda device: "a new stream",
            "graph_pool_handle": lambda: (0, 7),
            "synchronize": lambda: None,
            "empty_cache": self.empty_cache,
            "CUDAGraph": lambda: NativeGraph(self),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name, value in {
            "_host_emptyCache": lambda: None,
            "_cuda_endAllocateToPool": self.end,
            "_cuda_releasePool": lambda device, pool: None,
        }.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)

    def empty_cache(self):
        assert not self.pools, "captures_underway.empty() INTERNAL ASSERT FAILED"

    def end(self, device, pool):
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)


class Opened:
    """As torch's own: what was current is current again at the end."""

    def __init__(self, cuda, stream):
        self.cuda, self.stream = cuda, stream

    def __enter__(self):
        self.before = self.cuda.streams[-1]
        self.cuda.streams.append(self.stream)

    def __exit__(self, *error):
        self.cuda.streams.append(self.before)


class NativeGraph:
    """The order of what it does is that of `aten/src/ATen/cuda/CUDAGraph.cpp`."""

    def __init__(self, cuda):
        self.cuda = cuda

    def capture_begin(self, pool, **options):
        self.pool = pool
        self.cuda.pools.add(pool)

    def capture_end(self):
        if self.cuda.is_called_off:
            self.cuda.is_called_off = False
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.end(0, self.pool)

    def reset(self):
        pass


@pytest.mark.parametrize("is_called_off", [False, True])
def test_a_capture_that_fails_leaves_streams_and_allocator_as_they_were_and_says_why(monkeypatch, is_called_off):
    cuda = Cuda(monkeypatch)

    def call():
        assert cuda.streams[-1] == "a new stream"
        cuda.is_called_off = is_called_off
        raise RuntimeError("the host waits for a value")

    with pytest.raises(RuntimeError, match="the host waits for a value"):
        CudaGraph(torch.device("cuda", 0)).capture(call, [])
    assert cuda.streams[-1] == "the current stream"
    CudaGraph(torch.device("cuda", 0)).capture(lambda: None, [])
    assert cuda.streams[-1] == "the current stream"
    assert not cuda.pools
