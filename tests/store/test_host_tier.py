import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scarcity import Scarce
from slots.cuda_streams import Machine
from stores import number, numbered_store
from transformers_moe_offload.disk_io.chunks import Chunk
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.cuda.copier import CudaCopier
from transformers_moe_offload.slots.transfer import HostCopier
from transformers_moe_offload.store.host_tier import HostTier
from transformers_moe_offload.store.record import whole

RECORD = 128
EXPERTS = [ExpertId(layer, expert) for layer in range(2) for expert in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def store(folder):
    store = numbered_store(folder, 2, 4)
    assert store.layout(0, 0).nbytes == RECORD
    return store


def read(tier, expert):
    """An expert out of the tier, checked; returns the bytes that came from files."""
    record = torch.zeros(RECORD, dtype=torch.uint8)
    from_files = HostCopier(tier.fill, 1).start(expert, record).finish()
    weight = record[:24].view(torch.float32)
    assert set(weight.tolist()) == {number(expert)}
    return from_files


def test_an_expert_comes_from_disk_once(store):
    tier = HostTier(store, 8 * RECORD)
    assert [read(tier, EXPERTS[0]) for _ in range(3)] == [30, 0, 0]
    assert tier.nbytes == RECORD


def test_experts_beyond_the_budget_stay_on_disk_and_the_longest_unused_leaves(store):
    tier = HostTier(store, 2 * RECORD + 100)
    for expert in (EXPERTS[0], EXPERTS[1], EXPERTS[0], EXPERTS[2]):
        read(tier, expert)
    assert tier.nbytes == 2 * RECORD
    assert [read(tier, expert) for expert in (EXPERTS[0], EXPERTS[2], EXPERTS[1])] == [0, 0, 30]


def test_a_budget_too_small_for_one_record_keeps_nothing(store):
    tier = HostTier(store, RECORD - 1)
    assert [read(tier, EXPERTS[0]) for _ in range(2)] == [30, 30]
    assert tier.nbytes == 0


@settings(deadline=None, max_examples=40)
@given(wanted=st.lists(st.sampled_from(EXPERTS), max_size=40), num_records=st.integers(0, 8))
def test_what_is_read_is_what_was_asked_for_within_the_budget(store, wanted, num_records):
    tier = HostTier(store, num_records * RECORD)
    for expert in wanted:
        read(tier, expert)
        assert tier.nbytes <= num_records * RECORD


def test_many_threads_get_what_they_ask_for(store):
    tier = HostTier(store, 3 * RECORD)
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(read, tier, EXPERTS[i % 7]) for i in range(400)]:
            assert future.result(30) in (0, 30)
    assert tier.nbytes <= 3 * RECORD


class Slow:
    """A store whose reads wait for permission, and may fail."""

    def __init__(self, store, failures=0):
        self.store, self.failures, self.reads = store, failures, 0
        self.begun, self.go = threading.Event(), threading.Event()

    def layout(self, layer, expert):
        return self.store.layout(layer, expert)

    def fill(self, expert, chunk_bytes):
        return whole(self.read_into, RECORD)(expert, chunk_bytes)

    def read_into(self, expert, record):
        self.reads += 1
        self.begun.set()
        assert self.go.wait(10)
        if self.reads <= self.failures:
            raise CheckpointError("unreadable")
        return self.store.read_into(expert, record)


def test_two_threads_that_want_one_expert_read_it_once(store):
    slow = Slow(store)
    tier = HostTier(slow, 8 * RECORD)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, tier, EXPERTS[0])
        assert slow.begun.wait(10)
        second = pool.submit(read, tier, EXPERTS[0])
        slow.go.set()
        assert sorted([first.result(10), second.result(10)]) == [0, 30]
    assert slow.reads == 1


def test_a_read_that_failed_leaves_nothing_behind_and_is_tried_again(store):
    slow = Slow(store, failures=1)
    slow.go.set()
    tier = HostTier(slow, 8 * RECORD)
    with pytest.raises(CheckpointError, match="unreadable"):
        read(tier, EXPERTS[0])
    assert tier.nbytes == 0
    assert read(tier, EXPERTS[0]) == 30
    assert read(tier, EXPERTS[0]) == 0


def test_who_waited_for_a_read_that_failed_reads_for_itself(store):
    slow = Slow(store, failures=1)
    tier = HostTier(slow, 8 * RECORD)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, tier, EXPERTS[0])
        assert slow.begun.wait(10)
        second = pool.submit(read, tier, EXPERTS[0])
        slow.go.set()
        with pytest.raises(CheckpointError):
            first.result(10)
        assert second.result(10) == 30


def test_an_expert_whose_upload_finds_no_memory_can_be_uploaded_later(store, monkeypatch):
    """Also by another copier, which would wait for the first one's read of it."""
    machine = Machine()
    machine.install(monkeypatch)
    tier, slot = HostTier(store, 8 * RECORD), machine.slot(RECORD)
    # In pieces of the record, which a buffer of the ring does not hold: it goes by way of a whole record.
    monkeypatch.setattr(Chunk, "is_verbatim", False)
    copier = CudaCopier(tier.fill, 1, torch.device("cuda"), RECORD, pin_memory=False)
    scarce, failed = Scarce(monkeypatch), 0
    for at in range(1, 4):
        scarce.refuse(at)
        try:
            copier.start(EXPERTS[at], slot).finish()
        except MemoryError:
            failed += 1
        scarce.refuse(None)
        again = copier.start(EXPERTS[at], slot)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(again.finish).result(30)
        machine.run_all()
        assert set(torch.Tensor(slot[:24]).to(torch.uint8).view(torch.float32).tolist()) == {number(EXPERTS[at])}
        assert tier.nbytes == at * RECORD
    assert failed == 2, "for the tier's record, and for the whole one"


def test_a_copier_to_an_accelerator_reads_through_the_tier(store, monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)
    tier = HostTier(store, 8 * RECORD)
    copier = CudaCopier(tier.fill, 1, torch.device("cuda"), RECORD, pin_memory=False)
    for expected in (30, 0):
        slot = machine.slot(RECORD)
        assert copier.start(EXPERTS[5], slot).finish() == expected
        machine.run_all()
        assert set(torch.Tensor(slot[:24]).to(torch.uint8).view(torch.float32).tolist()) == {number(EXPERTS[5])}
