"""What is queued when, on a stand-in for CUDA's streams that run only when they are told to, and on a CPU."""

import pytest
import torch

from slots.cuda_streams import Machine
from transformers_moe_offload.device_decode.streams import CudaStreams, Streams, streams_of

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)
    return machine


def sevens():
    return torch.full((4,), 7, dtype=torch.uint8)


def plain(slot):
    return slot.as_subclass(torch.Tensor).tolist()


def test_a_copy_waits_for_its_marks_and_the_host_for_nothing(machine):
    streams, slot, seen = CudaStreams(GPU), machine.slot(4), []
    machine.compute.enqueue(lambda: seen.append(plain(slot)))
    copy = streams.copy(slot, sevens(), [streams.mark()])
    machine.copies.run()
    assert plain(slot) == [0] * 4
    assert not copy.is_done()
    assert copy.seconds is None
    machine.run_all()
    assert seen == [[0] * 4]
    assert plain(slot) == [7] * 4
    assert copy.is_done()


def test_a_copy_without_marks_waits_for_nobody(machine):
    streams, slot = CudaStreams(GPU), machine.slot(4)
    machine.compute.enqueue(lambda: None)
    copy = streams.copy(slot, sevens(), [])
    machine.copies.run()
    assert copy.is_done()


def test_how_long_a_copy_took_is_without_what_it_waited_for(machine):
    streams, slot = CudaStreams(GPU), machine.slot(4)
    for _ in range(50):
        machine.compute.enqueue(machine.tick)
    copy = streams.copy(slot, sevens(), [streams.mark()])
    machine.run_all()
    assert copy.seconds == pytest.approx(1e-3)


def test_a_mark_is_reached_when_the_compute_stream_gets_there(machine):
    streams = CudaStreams(GPU)
    before = streams.mark()
    machine.compute.run()
    machine.compute.enqueue(lambda: None)
    after = streams.mark()
    assert (before.is_done(), after.is_done()) == (True, False)
    after.wait()
    assert after.is_done()


def test_what_is_computed_after_joining_a_copy_sees_it(machine):
    streams, slot, seen = CudaStreams(GPU), machine.slot(4), []
    copy = streams.copy(slot, sevens(), [])
    streams.join(copy)
    streams.compute(lambda: machine.compute.enqueue(lambda: seen.append(plain(slot))))
    machine.compute.run()
    assert seen == []
    machine.run_all()
    assert seen == [[7] * 4]


def test_memory_that_is_copied_to_is_kept_for_the_copy_stream(machine):
    streams, slot = CudaStreams(GPU), machine.slot(4)
    streams.copy(slot, sevens(), [])
    assert machine.kept_for == [(slot.data_ptr(), machine.copies)]


def test_on_a_cpu_everything_has_happened_when_the_call_returns():
    streams, target, done = streams_of(torch.device("cpu")), torch.zeros(4, dtype=torch.uint8), []
    assert type(streams) is Streams
    copy = streams.copy(target, sevens(), [streams.mark()])
    streams.join(copy)
    assert target.tolist() == [7] * 4
    assert copy.is_done()
    assert copy.seconds >= 0
    streams.compute(lambda: done.append(True))
    streams.synchronize()
    assert done == [True]
    assert streams.host_memory((2, 3), torch.int64).shape == (2, 3)
    assert not streams.is_capturing()
