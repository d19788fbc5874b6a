import gc
import threading
import time

import pytest
import torch

from memory.streams import Machine
from stores import numbered_store
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.memory.transfer import CudaCopier, FakeCopier, HostCopier, default_workers

NBYTES = 32
FIRST, SECOND, THIRD = (ExpertId(0, i) for i in range(1, 4))
EXPERTS = [ExpertId(0, i) for i in range(1, 9)]


def write_number(expert, record):
    record.fill_(expert.expert)


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
    copier, slots = HostCopier(write_number, workers=2), slots_in_host_memory(8)
    transfers = [copier.start(expert, slot) for expert, slot in zip(EXPERTS, slots, strict=True)]
    for transfer in reversed(transfers):
        transfer.finish()
    assert [what_is_in(slot) for slot in slots] == [expert.expert for expert in EXPERTS]


def test_the_waiting_thread_does_a_read_that_has_not_begun():
    gate = Gate()
    copier, (busy, waiting) = HostCopier(gate.read, workers=1), slots_in_host_memory(2)
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

    copier, (busy, waiting) = HostCopier(read, workers=1), slots_in_host_memory(2)
    first, second = copier.start(FIRST, busy), copier.start(SECOND, waiting)
    assert gate.begun.wait(10)
    second.finish()
    gate.open.set()
    first.finish()
    copier.start(THIRD, waiting).finish()
    assert sorted(done) == [FIRST, SECOND, THIRD]


def test_a_transfer_is_done_when_waiting_for_it_would_not_take_long():
    gate = Gate()
    copier, (slot,) = HostCopier(gate.read, workers=1), slots_in_host_memory(1)
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

    copier, (busy, slot) = HostCopier(read, workers=1), slots_in_host_memory(2)
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

    copier, (slot,) = HostCopier(read, workers=1), slots_in_host_memory(1)
    with pytest.raises(OSError):
        copier.start(FIRST, slot).finish()
    copier.start(SECOND, slot).finish()
    assert what_is_in(slot) == SECOND.expert


def test_threads_end_when_the_copier_is_garbage():
    gc.collect()
    assert wait_until(lambda: not reader_threads())
    copier, (slot,) = HostCopier(write_number, workers=2), slots_in_host_memory(1)
    wait_until(copier.start(FIRST, slot).is_done)
    assert reader_threads()
    del copier
    gc.collect()
    assert wait_until(lambda: not reader_threads())


def test_a_machine_without_a_known_number_of_cores_has_one_worker(monkeypatch):
    for cores, workers in [(None, 1), (1, 1), (3, 3), (64, 4)]:
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert default_workers() == workers


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


# CudaCopier, over streams that run when they are told to (`streams.py`).


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)
    return machine


def cuda_copier(read=write_number, workers=1):
    return CudaCopier(read, workers, torch.device("cuda"), NBYTES, pin_memory=False)


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
    assert [what_is_in(slot) for slot in slots] == [0] * 4, "two buffers for each reader, so nobody had to wait"


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

    copier, slot = cuda_copier(read), machine.slot(NBYTES // 2)
    copier.start(FIRST, slot).finish()
    machine.run_all()
    assert asked == [NBYTES // 2]
    assert what_is_in(slot) == FIRST.expert


# CudaCopier, on a GPU.

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_gpu = pytest.mark.parametrize("pin_memory", [pytest.param(pinned, marks=gpu) for pinned in (True, False)])


@on_gpu
def test_a_gpu_gets_the_bytes_that_the_host_gets(tmp_path, pin_memory):
    store, device = numbered_store(tmp_path, 2, 8), torch.device("cuda")
    nbytes = store.layout(0, 0).nbytes
    on_host = HostCopier(store.read_into, 2)
    on_device = CudaCopier(store.read_into, 2, device, nbytes, pin_memory)
    for layer in range(2):
        for expert in range(8):
            slots = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8, device=device)
            for copier, slot in zip((on_host, on_device), slots, strict=True):
                copier.start(ExpertId(layer, expert), slot).finish()
            assert torch.equal(slots[0], slots[1].cpu())


@on_gpu
def test_a_gpu_slot_is_reused_under_a_long_running_kernel_and_nobody_notices(pin_memory):
    nbytes, device = 1 << 20, torch.device("cuda")
    copier = CudaCopier(write_number, 2, device, nbytes, pin_memory)
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
    copier = CudaCopier(write_number, 2, device, nbytes, pin_memory)
    slots = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(64)]
    transfers = [copier.start(EXPERTS[i % 8], slot) for i, slot in enumerate(slots)]
    for transfer in transfers:
        transfer.finish()
    for i, slot in enumerate(slots):
        assert (int(slot.amin()), int(slot.amax())) == (EXPERTS[i % 8].expert,) * 2
