"""Experts on their way to a GPU, over streams that run only when they are told to (`streams.py`)."""

import logging
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slots.cuda_streams import Machine
from stores import cut_short, numbered_store, put_back, stacked_store
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.buffers import CopiedSlots, SlotPool
from transformers_moe_offload.slots.cuda import staging_ring
from transformers_moe_offload.slots.cuda.copier import CudaCopier
from transformers_moe_offload.slots.cuda.staging_ring import RING_BYTES, StagingRing, ring_shape
from transformers_moe_offload.slots.transfer import HostCopier
from transformers_moe_offload.store.host_tier import HostTier
from transformers_moe_offload.store.record import whole

NBYTES = 32
FIRST, SECOND, THIRD = (ExpertId(0, i) for i in range(1, 4))
EXPERTS = [ExpertId(0, i) for i in range(1, 9)]


def write_number(expert, record):
    record.fill_(expert.expert)


def what_is_in(slot):
    (value,) = set(slot.tolist())
    return value


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)
    return machine


def cuda_copier(read=write_number, workers=1, nbytes=NBYTES):
    return CudaCopier(whole(read, nbytes), workers, torch.device("cuda"), NBYTES, pin_memory=False)


def use(machine, copier, slot, seen):
    """Submit a kernel that reads a slot, and let go of the slot."""
    machine.compute.enqueue(lambda: seen.append(what_is_in(slot)))
    copier.retire(slot)


def test_what_is_computed_after_finish_sees_the_expert(machine):
    copier, slot, seen = cuda_copier(), machine.slot(NBYTES), []
    copier.start(FIRST, slot).finish()
    use(machine, copier, slot, seen)
    machine.compute.run()
    assert seen == [], "the kernel waits for the copy"
    machine.run_all()
    assert seen == [FIRST.expert]


def test_the_host_does_not_wait_for_the_copy(machine):
    copier, slot = cuda_copier(), machine.slot(NBYTES)
    copier.start(FIRST, slot).finish()
    assert what_is_in(slot) == 0, "finish returned before the copy was done"


def test_a_slot_is_not_overwritten_before_the_kernels_that_read_it_are_done(machine):
    copier, slot, seen = cuda_copier(), machine.slot(NBYTES), []
    copier.start(FIRST, slot).finish()
    machine.run_all()
    use(machine, copier, slot, seen)
    copier.start(SECOND, slot).finish()
    machine.copies.run()
    assert what_is_in(slot) == FIRST.expert, "the copy stream ran ahead as far as it could"
    use(machine, copier, slot, seen)
    machine.run_all()
    assert seen == [FIRST.expert, SECOND.expert]


def test_a_slot_whose_load_failed_is_still_not_overwritten_too_early(machine):
    def read(expert, record):
        if expert == SECOND:
            raise CheckpointError("gone")
        write_number(expert, record)

    copier, slot, seen = cuda_copier(read), machine.slot(NBYTES), []
    copier.start(FIRST, slot).finish()
    machine.run_all()
    use(machine, copier, slot, seen)
    with pytest.raises(CheckpointError):
        copier.start(SECOND, slot).finish()
    copier.start(THIRD, slot).finish()
    machine.copies.run()
    assert what_is_in(slot) == FIRST.expert
    machine.run_all()
    assert seen == [FIRST.expert]
    assert what_is_in(slot) == THIRD.expert


def test_the_first_copy_waits_for_kernels_that_used_the_memory_before_it_was_a_slot(machine):
    """The allocator hands out memory as soon as its last reader is submitted, on the stream of that reader."""
    slot, seen = machine.slot(NBYTES), []
    machine.compute.enqueue(lambda: seen.append(what_is_in(slot)))
    copier = cuda_copier()
    copier.start(FIRST, slot).finish()
    machine.copies.run()
    assert what_is_in(slot) == 0
    machine.run_all()
    assert seen == [0]
    assert what_is_in(slot) == FIRST.expert


def test_memory_that_becomes_a_slot_later_is_not_overwritten_before_kernels_have_read_it(machine, tmp_path):
    """Slots come and go while a model is used: when its cache is resized."""
    store, seen = numbered_store(tmp_path, 1, 2), []
    nbytes = store.layout(0, 0).nbytes
    pool = _PoolOf(machine, nbytes)
    slots = CopiedSlots(store, pool, CudaCopier(store.fill, 1, torch.device("cuda"), nbytes, pin_memory=False))
    machine.run_all()
    machine.compute.enqueue(lambda: seen.append(what_is_in(pool.record(0))))
    slots.add(0)
    slots.start(ExpertId(0, 1), 0).finish()
    machine.copies.run()
    machine.run_all()
    assert seen == [0]
    assert set(pool.record(0).tolist()) != {0}


class _PoolOf(SlotPool):
    """Slots in a machine's memory."""

    def __init__(self, machine, nbytes):
        super().__init__(nbytes, torch.device("cpu"))
        self._machine = machine

    def _allocate(self, slot, nbytes):
        super()._allocate(slot, nbytes)
        self._slots[slot] = self._slots[slot]._replace(memory=self._machine.slot(nbytes))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_staging_buffer_is_not_filled_again_before_it_has_drained(machine, workers):
    copier = cuda_copier(workers=workers)
    slots = [machine.slot(NBYTES) for _ in EXPERTS]
    for expert, slot in zip(EXPERTS, slots, strict=True):
        copier.start(expert, slot).finish()
    machine.run_all()
    assert [what_is_in(slot) for slot in slots] == [expert.expert for expert in EXPERTS]


def test_reads_go_on_while_earlier_experts_are_still_being_copied(machine):
    copier = cuda_copier(workers=2)
    slots = [machine.slot(NBYTES) for _ in range(4)]
    for expert, slot in zip(EXPERTS, slots, strict=False):
        copier.start(expert, slot).finish()
    assert [what_is_in(slot) for slot in slots] == [0] * 4, "two buffers for each reader, so no reader had to wait"


def test_a_slot_that_is_dropped_while_it_is_being_filled_is_kept_for_the_copy(machine):
    copier, slot = cuda_copier(), machine.slot(NBYTES)
    copier.start(FIRST, slot).finish()
    assert machine.kept_for == [(slot.data_ptr(), machine.copies)]


def test_a_failed_read_gives_its_staging_buffer_back(machine):
    def read(expert, record):
        if expert != EXPERTS[-1]:
            raise CheckpointError("gone")
        write_number(expert, record)

    copier, slot = cuda_copier(read), machine.slot(NBYTES)
    for expert in EXPERTS[:-1]:  # more than there are buffers
        with pytest.raises(CheckpointError, match="gone"):
            copier.start(expert, slot).finish()
    copier.start(EXPERTS[-1], slot).finish()
    machine.run_all()
    assert what_is_in(slot) == EXPERTS[-1].expert


def test_a_record_shorter_than_the_staging_buffer_is_copied_alone(machine):
    asked = []

    def read(expert, record):
        asked.append(record.numel())
        write_number(expert, record)

    copier, slot = cuda_copier(read, nbytes=NBYTES // 2), machine.slot(NBYTES // 2)
    copier.start(FIRST, slot).finish()
    machine.run_all()
    assert asked == [NBYTES // 2]
    assert what_is_in(slot) == FIRST.expert


# Records larger than a staging buffer.


@pytest.fixture
def narrow(monkeypatch):
    """Staging buffers of 256 bytes."""
    monkeypatch.setattr(staging_ring, "BUFFER_BYTES", 256)


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory):
    """Four experts of 1.4 KiB in two fields."""
    numbers = torch.Generator().manual_seed(0)
    tensors = {
        f"0.{name}": torch.randn(4, *shape, generator=numbers) for name, shape in {"a": (11, 13), "b": (200,)}.items()
    }
    return stacked_store(tmp_path_factory.mktemp("wide"), tensors)


def record_of(store, expert):
    record = torch.zeros(store.layout(0, 0).nbytes, dtype=torch.uint8)
    store.read_into(expert, record)
    return record


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("tier", ["disk", "host", "too small a host"])
def test_a_record_larger_than_a_buffer_passes_through_in_chunks(machine, narrow, wide_store, workers, tier):
    nbytes = wide_store.layout(0, 0).nbytes
    budget = {"disk": 0, "host": 4 * nbytes, "too small a host": nbytes}[tier]
    copier = CudaCopier(HostTier(wide_store, budget).fill, workers, torch.device("cuda"), nbytes, pin_memory=False)
    for _ in range(2):
        slots = [machine.slot(nbytes) for _ in range(4)]
        transfers = [copier.start(ExpertId(0, expert), slot, 3) for expert, slot in enumerate(slots)]
        for transfer in transfers:
            transfer.finish()
        machine.run_all()
        for expert, slot in enumerate(slots):
            assert torch.equal(slot.as_subclass(torch.Tensor), record_of(wide_store, ExpertId(0, expert)))


def test_a_record_that_is_only_read_whole_passes_through_in_parts(machine, narrow):
    def count_up(expert, record):
        record.copy_(torch.arange(1000).to(torch.uint8))
        return 1000

    slot = machine.slot(1000)
    copier = CudaCopier(whole(count_up, 1000), 1, torch.device("cuda"), 1000, pin_memory=False)
    assert copier.start(FIRST, slot).finish() == 1000
    machine.run_all()
    assert torch.equal(slot.as_subclass(torch.Tensor), torch.arange(1000).to(torch.uint8))


def test_a_field_that_has_to_be_cast_arrives_cast(machine, narrow, tmp_path):
    store = numbered_store(tmp_path, 1, 2)
    layer = store.layers[0].cast("float64")
    cast = type(store)([layer])
    nbytes = cast.layout(0, 0).nbytes
    slot = machine.slot(nbytes)
    CudaCopier(cast.fill, 2, torch.device("cuda"), nbytes, pin_memory=False).start(ExpertId(0, 1), slot).finish()
    machine.run_all()
    assert torch.equal(slot.as_subclass(torch.Tensor), record_of(cast, ExpertId(0, 1)))


def test_no_part_of_a_chunked_record_overtakes_a_kernel_that_reads_the_slot(machine, narrow, wide_store):
    nbytes = wide_store.layout(0, 0).nbytes
    copier, slot, seen = CudaCopier(wide_store.fill, 2, torch.device("cuda"), nbytes, False), machine.slot(nbytes), []
    for expert in range(3):
        copier.start(ExpertId(0, expert), slot).finish()
        machine.compute.enqueue(lambda: seen.append(slot.as_subclass(torch.Tensor).clone()))
        copier.retire(slot)
        machine.copies.run()
    machine.run_all()
    for expert, record in enumerate(seen):
        assert torch.equal(record, record_of(wide_store, ExpertId(0, expert)))


def test_a_chunk_that_fails_leaves_the_ring_whole_and_the_tier_empty(machine, narrow, tmp_path):
    tensors = {"0.a": torch.arange(4 * 500).reshape(4, 500).float()}
    store = stacked_store(tmp_path, tensors)
    path, nbytes = tmp_path / "model.safetensors", store.layout(0, 0).nbytes
    tier = HostTier(store, 4 * nbytes)
    copier = CudaCopier(tier.fill, 2, torch.device("cuda"), nbytes, pin_memory=False)
    slot = machine.slot(nbytes)
    for _ in range(5):  # more chunks than there are buffers
        with put_back(path) as whole_file:
            cut_short(path, len(whole_file) - 100)
            with pytest.raises(CheckpointError):
                copier.start(ExpertId(0, 3), slot).finish()
        assert tier.nbytes == 0
    copier.start(ExpertId(0, 3), slot).finish()
    machine.run_all()
    assert torch.equal(slot.as_subclass(torch.Tensor), record_of(store, ExpertId(0, 3)))


# The ring.


@given(record_bytes=st.integers(1, 1 << 40), num_lanes=st.integers(1, 10_000))
def test_the_ring_never_takes_more_than_its_cap(record_bytes, num_lanes):
    shape = ring_shape(record_bytes, num_lanes)
    assert shape.nbytes <= RING_BYTES
    assert shape.buffer_bytes & (shape.buffer_bytes - 1) == 0, "the allocator would round it up"
    assert shape.count >= 2


@given(record_bytes=st.integers(1, 1 << 22), num_lanes=st.integers(1, 8))
def test_an_ordinary_record_fits_into_a_buffer_and_every_reader_has_two(record_bytes, num_lanes):
    shape = ring_shape(record_bytes, num_lanes)
    assert shape.count == 2 * num_lanes
    assert record_bytes <= shape.buffer_bytes < 2 * record_bytes


class PinnedMemory:
    """What `torch.empty` does about page-locked memory, counted, up to a limit."""

    def __init__(self, limit):
        self.limit, self.granted, self._empty = limit, 0, torch.empty

    def empty(self, *args, pin_memory=False, **kwargs):
        tensor = self._empty(*args, **kwargs)
        if pin_memory:
            if self.granted + tensor.nbytes > self.limit:
                raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
            self.granted += tensor.nbytes
        return tensor


@pytest.mark.parametrize("record_bytes", [1000, 5 << 20, 1 << 30])
def test_page_locked_memory_stays_below_the_cap_whatever_a_record_takes(machine, monkeypatch, record_bytes):
    memory = PinnedMemory(limit=1 << 40)
    monkeypatch.setattr(torch, "empty", memory.empty)
    CudaCopier(whole(write_number, record_bytes), 4, torch.device("cuda"), record_bytes, pin_memory=True)
    assert 0 < memory.granted <= RING_BYTES


def test_where_no_page_locked_memory_is_granted_one_warning_says_so_and_pageable_memory_is_used(
    machine, monkeypatch, caplog
):
    monkeypatch.setattr(torch, "empty", PinnedMemory(limit=5 * NBYTES).empty)
    with caplog.at_level(logging.WARNING):
        copier = CudaCopier(whole(write_number, NBYTES), 4, torch.device("cuda"), NBYTES, pin_memory=True)
    (warning,) = caplog.records
    assert "256 bytes of page-locked memory (CUDA error: out of memory)" in warning.getMessage()
    assert "pin_memory=False" in warning.getMessage()
    slots = [machine.slot(NBYTES) for _ in EXPERTS]
    for expert, slot in zip(EXPERTS, slots, strict=True):
        copier.start(expert, slot).finish()
    machine.run_all()
    assert [what_is_in(slot) for slot in slots] == [expert.expert for expert in EXPERTS]


@settings(max_examples=20, deadline=None)
@given(fails=st.lists(st.booleans(), max_size=20))
def test_a_buffer_comes_back_whatever_happens_to_it(fails):
    with pytest.MonkeyPatch.context() as patch:
        Machine().install(patch)
        ring = StagingRing(ring_shape(NBYTES, 1), pin_memory=False)
        for fail in fails:
            with suppress(ZeroDivisionError), ring.buffer():
                1 / (not fail)
        with ring.buffer() as one, ring.buffer() as other:
            assert one is not other


# On a GPU.


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_gpu = pytest.mark.parametrize("pin_memory", [pytest.param(pinned, marks=gpu) for pinned in (True, False)])


@on_gpu
def test_a_gpu_gets_the_bytes_that_the_host_gets(tmp_path, pin_memory):
    store, device = numbered_store(tmp_path, 2, 8), torch.device("cuda")
    nbytes = store.layout(0, 0).nbytes
    on_host = HostCopier(store.fill, 2)
    on_device = CudaCopier(store.fill, 2, device, nbytes, pin_memory)
    for layer in range(2):
        for expert in range(8):
            slots = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8, device=device)
            for copier, slot in zip((on_host, on_device), slots, strict=True):
                copier.start(ExpertId(layer, expert), slot).finish()
            assert torch.equal(slots[0], slots[1].cpu())


@on_gpu
def test_a_gpu_slot_is_reused_under_a_long_running_kernel_and_nobody_notices(pin_memory):
    nbytes, device = 1 << 20, torch.device("cuda")
    copier = CudaCopier(whole(write_number, nbytes), 2, device, nbytes, pin_memory)
    slot = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    seen = []
    for expert in EXPERTS * 4:
        copier.start(expert, slot).finish()
        torch.cuda._sleep(20_000_000)  # about 10 ms, during which the next copy is ready to go
        seen.append((slot.amin(), slot.amax()))
        copier.retire(slot)
    assert [(int(low), int(high)) for low, high in seen] == [(e.expert, e.expert) for e in EXPERTS * 4]


@on_gpu
def test_gpu_staging_buffers_hold_up_under_many_loads_at_once(pin_memory):
    nbytes, device = 1 << 20, torch.device("cuda")
    copier = CudaCopier(whole(write_number, nbytes), 2, device, nbytes, pin_memory)
    slots = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(64)]
    transfers = [copier.start(EXPERTS[i % 8], slot) for i, slot in enumerate(slots)]
    for transfer in transfers:
        transfer.finish()
    for i, slot in enumerate(slots):
        assert (int(slot.amin()), int(slot.amax())) == (EXPERTS[i % 8].expert,) * 2
