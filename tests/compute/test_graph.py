"""A recorded call gives what the call gives, and nothing in it waits for the device."""

import pytest
import torch

from transformers_moe_offload.compute.graph import RerunGraph
from transformers_moe_offload.compute.without_host import HostSyncError, without_host

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
