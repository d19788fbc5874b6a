"""What comes from another device is the same expert, in the same order of things."""

import pytest
import torch

from stores import numbered_store
from transformers_moe_offload.engine.arena import Arena
from transformers_moe_offload.engine.peers import PASSES, copy_seconds, faster_peers, lodge
from transformers_moe_offload.engine.streams import HostStreams, streams_of
from transformers_moe_offload.expert import ExpertId

from .machine import NUM_EXPERTS, NUM_LAYERS, Machine
from .streams import AdversarialStreams
from .test_races import drive

CPU, OTHER = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def arena(tmp_path):
    return Arena(numbered_store(tmp_path, NUM_LAYERS, NUM_EXPERTS), range(NUM_LAYERS), CPU)


def test_an_expert_with_a_copy_comes_from_there_and_is_read_in_place_where_it_was(arena):
    expert, other = ExpertId(1, 2), ExpertId(1, 3)
    home = arena.addresses(1)[2]
    arena.copy_to({expert: CPU})
    assert arena.source(expert).data_ptr() != home == arena.addresses(1)[2]
    assert torch.equal(arena.source(expert), arena.record(expert))
    assert arena.source(other) is arena.record(other)


def test_copies_are_made_as_far_as_there_is_memory_to_spare(arena):
    nbytes = arena.record(ExpertId(0, 0)).nbytes
    lodge({CPU: [arena]}, {OTHER: 5 * nbytes + 1, CPU: 0}, {CPU: [OTHER]})
    there = [expert for expert in arena.experts if arena.source(expert).device == OTHER]
    assert len(there) == 5
    assert {expert.layer for expert in there} == set(range(NUM_LAYERS))


def test_without_a_faster_device_there_are_no_copies(arena):
    lodge({CPU: [arena]}, {OTHER: 1 << 30}, {CPU: []})
    assert all(arena.source(expert) is arena.record(expert) for expert in arena.experts)


@pytest.mark.parametrize("seed", range(2))
def test_no_kernel_finds_other_bytes_where_slots_are_filled_from_copies(tmp_path, seed):
    machine = Machine(tmp_path, seed)
    machine.arena.copy_to({expert: CPU for expert in machine.arena.experts if expert.expert % 2})
    drive(machine, 150)
    assert sum(one.hits for one in machine.finish().values()) > 0
    assert machine.streams.problems == []


def test_a_closed_arena_keeps_no_copies(arena):
    arena.copy_to(dict.fromkeys(arena.experts, CPU))
    copies = [arena.source(expert) for expert in arena.experts]
    arena.close()
    assert len(copies) == NUM_LAYERS * NUM_EXPERTS
    assert not arena.experts
    assert not arena._copies


@pytest.mark.parametrize("streams", [HostStreams(), AdversarialStreams(0)])
def test_copies_are_timed_by_the_streams_that_make_them(streams):
    source, target = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    assert copy_seconds(streams, target, source) > 0
    assert torch.equal(target, source)


def test_the_fastest_copy_counts_and_the_first_does_not():
    class Counted(HostStreams):
        times = iter([9.0, 3.0, 1.0, 2.0])

        def copy(self, target, source, after):
            done = super().copy(target, source, after)
            done.seconds = next(self.times)
            return done

    streams = Counted()
    assert PASSES == 3
    assert copy_seconds(streams, torch.zeros(1), torch.zeros(1)) == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_between_two_gpus_a_copy_has_the_bytes_and_the_source_goes_on_computing():
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    record = torch.randint(0, 255, (1 << 20,), dtype=torch.uint8)
    target = torch.zeros_like(record, device=here)
    source = record.to(there)
    with torch.cuda.device(there):
        torch.cuda._sleep(1 << 30)
        computed = torch.cuda.Event()
        computed.record()
    copy = streams_of(here).copy(target, source, ())
    copy.wait()
    assert not computed.query()
    assert torch.equal(target.cpu(), record)
    assert set(faster_peers(here, [there], record.pin_memory())) <= {there}
