import gc
import threading
import time

import pytest
import torch

from copiers import FakeCopier
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.transfer import HostCopier
from transformers_moe_offload.store.record import whole

NBYTES = 32
FIRST, SECOND, THIRD = (ExpertId(0, i) for i in range(1, 4))
EXPERTS = [ExpertId(0, i) for i in range(1, 9)]


def write_number(expert, record):
    record.fill_(expert.expert)


def host_copier(read, workers):
    return HostCopier(whole(read, NBYTES), workers)


def slots_in_host_memory(count):
    return [torch.zeros(NBYTES, dtype=torch.uint8) for _ in range(count)]


def what_is_in(slot):
    (value,) = set(slot.tolist())
    return value


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("moe-offload-read")]


def wait_until(claim, seconds=10):
    deadline = time.monotonic() + seconds
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.005)
    return claim()


class Gate:
    """A read that waits for permission, and notes which thread did it."""

    def __init__(self):
        self.begun, self.open, self.threads = threading.Event(), threading.Event(), {}

    def read(self, expert, record):
        self.threads[expert] = threading.current_thread()
        if expert == FIRST:
            self.begun.set()
            assert self.open.wait(10)
        record.fill_(expert.expert)


# HostCopier.


def test_experts_arrive_in_their_slots():
    copier, slots = host_copier(write_number, workers=2), slots_in_host_memory(8)
    transfers = [copier.start(expert, slot) for expert, slot in zip(EXPERTS, slots, strict=True)]
    for transfer in reversed(transfers):
        transfer.finish()
    assert [what_is_in(slot) for slot in slots] == [expert.expert for expert in EXPERTS]


def test_the_waiting_thread_does_a_read_that_has_not_begun():
    gate = Gate()
    copier, (busy, waiting) = host_copier(gate.read, workers=1), slots_in_host_memory(2)
    first = copier.start(FIRST, busy)
    assert gate.begun.wait(10)
    copier.start(SECOND, waiting).finish()
    assert what_is_in(waiting) == SECOND.expert
    assert gate.threads[SECOND] is threading.current_thread()
    assert gate.threads[FIRST] is not threading.current_thread()
    gate.open.set()
    first.finish()


def test_a_read_that_somebody_did_while_waiting_is_not_done_again():
    gate, done = Gate(), []

    def read(expert, record):
        gate.read(expert, record)
        done.append(expert)

    copier, (busy, waiting) = host_copier(read, workers=1), slots_in_host_memory(2)
    first, second = copier.start(FIRST, busy), copier.start(SECOND, waiting)
    assert gate.begun.wait(10)
    second.finish()
    gate.open.set()
    first.finish()
    copier.start(THIRD, waiting).finish()
    assert sorted(done) == [FIRST, SECOND, THIRD]


def test_a_transfer_is_done_when_waiting_for_it_would_not_take_long():
    gate = Gate()
    copier, (slot,) = host_copier(gate.read, workers=1), slots_in_host_memory(1)
    transfer = copier.start(FIRST, slot)
    assert not transfer.is_done()
    gate.open.set()
    assert wait_until(transfer.is_done)
    assert what_is_in(slot) == FIRST.expert


@pytest.mark.parametrize("begun", [False, True])
def test_an_error_of_the_read_surfaces_where_it_is_waited_for(begun):
    gate = Gate()

    def read(expert, record):
        gate.read(expert, record)
        raise CheckpointError(f"no {expert.expert}")

    copier, (busy, slot) = host_copier(read, workers=1), slots_in_host_memory(2)
    first = copier.start(FIRST, busy)
    assert gate.begun.wait(10)
    failing = first if begun else copier.start(SECOND, slot)
    if begun:
        gate.open.set()
    with pytest.raises(CheckpointError, match="no 1" if begun else "no 2"):
        failing.finish()
    gate.open.set()


def test_after_an_error_the_next_read_works():
    def read(expert, record):
        if expert == FIRST:
            raise OSError
        write_number(expert, record)

    copier, (slot,) = host_copier(read, workers=1), slots_in_host_memory(1)
    with pytest.raises(OSError):
        copier.start(FIRST, slot).finish()
    copier.start(SECOND, slot).finish()
    assert what_is_in(slot) == SECOND.expert


def test_threads_end_when_the_copier_is_garbage():
    others = set(reader_threads())
    copier, (slot,) = host_copier(write_number, workers=2), slots_in_host_memory(1)
    wait_until(copier.start(FIRST, slot).is_done)
    assert set(reader_threads()) - others
    del copier
    gc.collect()
    assert wait_until(lambda: set(reader_threads()) <= others)


# FakeCopier.


def test_the_fake_remembers_and_moves_nothing():
    copier, (slot,) = FakeCopier(), slots_in_host_memory(1)
    transfer = copier.start(FIRST, slot)
    assert transfer.is_done()
    transfer.finish()
    assert copier.started == [FIRST]
    assert what_is_in(slot) == 0


def test_the_fake_fails_where_it_is_told_to():
    copier, (slot,) = FakeCopier(), slots_in_host_memory(1)
    copier.fail_on = {SECOND}
    copier.start(FIRST, slot).finish()
    with pytest.raises(OSError, match="told to fail"):
        copier.start(SECOND, slot).finish()
