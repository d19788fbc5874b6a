"""Experts that are read in chunks: whole or not at all, whatever fails, is cancelled or interrupted."""

import random
import threading
import time
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import cut_short, put_back, stacked_store
from transformers_moe_offload.disk_io.read import Read, Work
from transformers_moe_offload.disk_io.reader_pool import LEAST_CHUNK, ReaderPool, chunk_bytes, default_workers
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.transfer import HostCopier

MIB = 1 << 20


def never():
    raise AssertionError("given up")


class TestHowLarge:
    def test_an_expert_alone_is_divided_among_all_lanes_and_whoever_waits(self):
        assert chunk_bytes(12 * MIB, num_lanes=2, alongside=0) == 4 * MIB
        assert chunk_bytes(12 * MIB, num_lanes=3, alongside=0) == 3 * MIB

    def test_with_enough_others_on_their_way_it_is_read_whole(self):
        assert chunk_bytes(12 * MIB, num_lanes=2, alongside=2) is None
        assert chunk_bytes(12 * MIB, num_lanes=4, alongside=4) is None

    def test_a_small_one_is_read_whole(self):
        assert chunk_bytes(2 * LEAST_CHUNK - 1, num_lanes=4, alongside=0) is None
        assert chunk_bytes(0, num_lanes=4, alongside=0) is None

    @given(nbytes=st.integers(0, 1 << 32), num_lanes=st.integers(1, 64), alongside=st.integers(0, 200))
    def test_no_chunk_is_smaller_than_it_pays(self, nbytes, num_lanes, alongside):
        found = chunk_bytes(nbytes, num_lanes, alongside)
        assert found is None or LEAST_CHUNK <= found < nbytes


class TestRead:
    def test_chunks_are_read_at_once_and_completed_once_after_the_last(self):
        lanes, together, done = ReaderPool(3), threading.Barrier(3), []

        def chunk(number):
            together.wait(10)  # all three, or none gets past
            done.append(number)

        read = lanes.start(Work([partial(chunk, n) for n in range(3)], lambda: done.append("whole") or 42, never))
        assert read.finish() == 42
        assert sorted(done[:3]) == [0, 1, 2]
        assert done[3:] == ["whole"]

    def test_it_is_not_done_before_its_last_chunk(self):
        lanes, go = ReaderPool(2), threading.Event()
        read = lanes.start(Work([lambda: None, lambda: go.wait(10)], lambda: 0, never))
        time.sleep(0.05)
        assert not read.is_done()
        go.set()
        read.finish()
        assert read.is_done()

    def test_one_that_fails_is_told_when_nobody_writes_any_more_and_the_rest_is_dropped(self):
        lanes, begun, go, events = ReaderPool(1), threading.Event(), threading.Event(), []

        def slow():  # in one of two threads, the lane and the waiter
            begun.set()
            assert go.wait(10)
            events.append("slow one ended")

        def failing():
            assert begun.wait(10)
            threading.Timer(0.05, go.set).start()
            raise CheckpointError("torn")

        def dropped():
            events.append("read in vain")

        read = lanes.start(Work([slow, failing, *[dropped] * 5], never, lambda: events.append("given up")))
        with pytest.raises(CheckpointError, match="torn"):
            read.finish()
        assert events == ["slow one ended", "given up"]

    def test_what_fails_on_completion_is_told(self):
        def damaged():
            raise CheckpointError("checksum")

        given_up = []
        with pytest.raises(CheckpointError, match="checksum"):
            ReaderPool(1).start(Work([lambda: None], damaged, lambda: given_up.append(1))).finish()
        assert given_up == [1]

    def test_one_that_nobody_has_begun_is_given_up_and_never_read(self):
        lanes, go, events = ReaderPool(1), threading.Event(), []
        busy = lanes.start(Work([lambda: go.wait(10)], lambda: 0, never))
        read = lanes.start(Work([lambda: events.append("read")] * 3, never, lambda: events.append("given up")))
        assert read.cancel()
        go.set()
        busy.finish()
        lanes.start(Work([lambda: None], lambda: 0, never)).finish()  # behind it in the queue
        assert events == ["given up"]

    def test_one_that_was_begun_cannot_be_cancelled_and_arrives_whole(self):
        lanes, begun, go, done = ReaderPool(1), threading.Event(), threading.Event(), []

        def first():
            begun.set()
            go.wait(10)
            done.append(0)

        read = lanes.start(Work([first, lambda: done.append(1)], lambda: 7, never))
        assert begun.wait(10)
        assert not read.cancel()
        go.set()
        assert read.finish() == 7
        assert sorted(done) == [0, 1]

    def test_ctrl_c_in_a_chunk_of_the_one_who_waits_leaves_it_to_be_read_again(self):
        attempts = []

        def interrupted_once():
            attempts.append(1)
            if len(attempts) == 1:
                raise KeyboardInterrupt

        read = Read(Work([interrupted_once, lambda: None], lambda: 5, never))  # only the waiter
        with pytest.raises(KeyboardInterrupt):
            read.finish()
        assert not read.is_done()
        assert read.finish() == 5
        assert len(attempts) == 2

    def test_time_counts_for_every_lane(self):
        read = ReaderPool(2).start(Work([lambda: time.sleep(0.03)] * 2, lambda: 0, never))
        read.finish()
        assert read.seconds >= 0.06

    @settings(max_examples=60, deadline=None)
    @given(
        num_lanes=st.integers(1, 4),
        plans=st.lists(st.lists(st.sampled_from(["ok", "ok", "ok", "fail"]), max_size=5), min_size=1, max_size=6),
        cancelled=st.sets(st.integers(0, 5)),
        seed=st.integers(0, 99),
    )
    def test_whatever_fails_or_is_cancelled_each_expert_ends_in_one_way(self, num_lanes, plans, cancelled, seed):
        lanes, order = ReaderPool(num_lanes), random.Random(seed)
        ends = [[] for _ in plans]
        running = [0 for _ in plans]
        lock = threading.Lock()

        def chunk(expert, outcome):
            with lock:
                running[expert] += 1
            time.sleep(0)
            with lock:
                running[expert] -= 1
            if outcome == "fail":
                raise OSError(outcome)

        def end(expert, how):
            assert running[expert] == 0, "a thread still writes"
            ends[expert].append(how)
            return expert

        reads = [
            lanes.start(
                Work(
                    [partial(chunk, e, outcome) for outcome in plan],
                    partial(end, e, "whole"),
                    partial(end, e, "given up"),
                )
            )
            for e, plan in enumerate(plans)
        ]
        for e in order.sample(range(len(plans)), len(plans)):
            if e in cancelled and reads[e].cancel():
                expected = "given up"
            elif "fail" in plans[e]:
                expected = "given up"
                with pytest.raises(OSError, match="fail"):
                    reads[e].finish()
            else:
                expected = "whole"
                assert reads[e].finish() == e
            assert ends[e] == [expected]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four experts of nearly 12 MiB: three matrices, and a bias between them in the file."""
    folder = tmp_path_factory.mktemp("large")
    random_numbers = torch.Generator().manual_seed(0)
    tensors = {
        f"0.{name}": torch.randn(4, *shape, generator=random_numbers)
        for name, shape in {"a": (1000, 1001), "bias": (17,), "c": (999, 1024), "d": (1024, 1024)}.items()
    }
    return stacked_store(folder, tensors), tensors, folder


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("alongside", [0, 1, 9])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_expert_read_in_chunks_is_the_expert(large, workers, alongside, past_cache):
    store, tensors, _ = large
    store.past_cache = past_cache
    slot = torch.zeros(store.layout(0, 0).nbytes, dtype=torch.uint8)
    for expert in range(4):
        copier = HostCopier(store.fill, workers)
        from_files = copier.start(ExpertId(0, expert), slot, alongside).finish()
        found = store.layout(0, 0).views(slot)
        assert all(torch.equal(found[name.split(".")[1]], tensor[expert]) for name, tensor in tensors.items())
        assert from_files == sum(tensor[expert].nbytes for tensor in tensors.values())
    store.past_cache = False


def test_one_miss_uses_all_lanes(large):
    store, threads = large[0], set()
    fill = store.fill(ExpertId(0, 0), chunk_bytes(store.layout(0, 0).nbytes, 3, 0))
    assert len(fill.chunks) >= 4
    record = memoryview(bytearray(store.layout(0, 0).nbytes))
    together = threading.Barrier(3, timeout=10)

    def read(number, chunk):
        if number < 3:
            together.wait()  # three chunks of one expert at the same time
        threads.add(threading.get_ident())
        fill.read(chunk, chunk.inside(record))

    ReaderPool(3).start(Work([partial(read, n, c) for n, c in enumerate(fill.chunks)], lambda: 0, never)).finish()
    assert len(threads) >= 3


def test_a_file_cut_short_under_one_of_the_chunks_is_an_error_and_the_slot_can_be_used_again(large):
    store, tensors, folder = large
    path = folder / "model.safetensors"
    slot = torch.zeros(store.layout(0, 0).nbytes, dtype=torch.uint8)
    copier = HostCopier(store.fill, 4)
    last = max((piece for piece in store.layers[0].experts[3].pieces), key=lambda piece: piece.offset)
    with put_back(path):
        cut_short(path, last.offset + last.nbytes - 10)
        with pytest.raises(CheckpointError, match=r"ends at byte|bytes, but had"):
            copier.start(ExpertId(0, 3), slot).finish()
        before = slot.clone()
        time.sleep(0.05)
        assert torch.equal(before, slot), "no thread writes into the slot any more"
    copier.start(ExpertId(0, 2), slot).finish()
    assert torch.equal(store.layout(0, 0).views(slot)["a"], tensors["0.a"][2])


def test_a_machine_without_a_known_number_of_cores_has_one_worker(monkeypatch):
    for cores, workers in [(None, 1), (1, 1), (3, 3), (64, 4)]:
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert default_workers() == workers
