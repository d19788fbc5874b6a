"""A process forks while experts are being read: it and its child both get the right ones, and neither hangs."""

import errno
import os
import random
import signal
import threading
import time

import pytest
import torch

from ctrl_c import in_another_thread
from forked import Child, in_a_child
from stores import stacked_store
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.disk_io.read import Work
from transformers_moe_offload.disk_io.reader_pool import ReaderPool
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import make_policy
from transformers_moe_offload.slots import direct_io
from transformers_moe_offload.slots.buffers import CopiedSlots, SlotPool
from transformers_moe_offload.slots.direct_io import DirectSlots
from transformers_moe_offload.slots.mapped import MappedSlots
from transformers_moe_offload.slots.transfer import HostCopier
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.system.forks import FORKS, Rank
from transformers_moe_offload.system.host_memory import PAGE_BYTES

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

NUM_EXPERTS = 12
SHAPE = (40, 1000)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Every weight of an expert is its number."""
    stack = torch.arange(NUM_EXPERTS).float().view(-1, 1, 1).expand(-1, *SHAPE).contiguous()
    return stacked_store(tmp_path_factory.mktemp("store"), {"0.weight": stack})


def mapped(store, monkeypatch):
    return MappedSlots(store, 2)


def copied(store, monkeypatch):
    return _copied(store)


def copied_past_the_page_cache(store, monkeypatch):
    return _copied(ExpertStore(list(store.layers.values()), past_cache=True))


def _copied(store):
    pool = SlotPool(store.layout(0, 0).nbytes, torch.device("cpu"))
    return CopiedSlots(store, pool, HostCopier(store.fill, 2))


def paged_by_the_kernel(store, monkeypatch):
    nbytes, spare = store.layout(0, 0).nbytes, store.spare_bytes(0)
    return DirectSlots(store, nbytes + spare, spare, 2)


def paged_by_threads(store, monkeypatch):
    def refuse():
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(direct_io, "AioQueue", refuse)
    return paged_by_the_kernel(store, monkeypatch)


def is_right(cache, seed, num_visits):
    """Whether some visits get the experts that they ask for."""
    choose = random.Random(seed)

    def load_ahead(_):
        expert = ExpertId(0, choose.randrange(NUM_EXPERTS))
        if cache.is_absent(expert):
            cache.load_ahead(expert)

    for _ in range(num_visits):
        wanted = choose.sample(range(NUM_EXPERTS), choose.randint(1, 6))
        with cache.turn, cache.visit(0, wanted, load_ahead) as visit:
            found = {expert: (weights["weight"] == expert).all() for expert, weights in visit}
        if found.keys() != set(wanted) or not all(found.values()):
            return False
    return True


@pytest.mark.parametrize("slots", [mapped, copied, copied_past_the_page_cache, paged_by_the_kernel, paged_by_threads])
def test_parent_and_child_get_the_right_experts_while_another_thread_reads(store, slots, monkeypatch):
    cache = ExpertCache(slots(store, monkeypatch), 4, {0: NUM_EXPERTS}, make_policy("lru"))
    right, is_enough = [], threading.Event()

    def go_on():
        while not is_enough.is_set():
            right.append(is_right(cache, len(right), 5))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for child in range(6):
            assert in_a_child(lambda seed=child: is_right(cache, seed, 10))
    finally:
        is_enough.set()
        thread.join()
    assert all(right)
    assert is_right(cache, 0, 10)


def test_reads_past_the_page_cache_go_into_memory_of_one_process(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(PAGE_BYTES) + b"1" * PAGE_BYTES)
    file, page = File.now(path), bytearray(PAGE_BYTES)

    def reads(number, content):
        for _ in range(2000):
            file.scatter_into([memoryview(page)], number * PAGE_BYTES, past_cache=True)
            if page != content * PAGE_BYTES:
                return False
        return True

    assert reads(0, b"\0")
    child = Child(lambda: reads(1, b"1"))
    is_right_here = reads(0, b"\0")
    assert child.result()
    assert is_right_here


def test_a_fork_waits_for_what_threads_are_reading():
    memory, has_begun = bytearray(2), threading.Event()

    def slowly(place):
        has_begun.set()
        time.sleep(0.1)
        memory[place] = 1

    read = ReaderPool(1).start(Work([lambda: slowly(0), lambda: slowly(1)], lambda: 7))
    has_begun.wait()
    assert in_a_child(lambda: (read.is_done(), read.finish(), bytes(memory))) == (True, 7, b"\1\1")
    assert read.finish() == 7


def test_a_child_has_threads_that_read():
    lanes = ReaderPool(2)
    assert lanes.start(Work([int], lambda: 1)).finish() == 1

    def reads_beside():
        is_over = threading.Event()
        lanes.start(Work([is_over.set], lambda: 1))
        return is_over.wait(30)

    assert in_a_child(reads_beside)
    assert reads_beside()


@pytest.mark.parametrize("rank", list(Rank))
def test_a_lock_that_another_thread_has_is_free_in_a_child(rank):
    lock, has_it = FORKS.with_lock(threading.RLock(), rank), threading.Event()

    def hold():
        with lock:
            has_it.set()
            time.sleep(0.1)

    thread = threading.Thread(target=hold)
    thread.start()
    has_it.wait()
    assert in_a_child(lambda: lock.acquire(timeout=30))
    thread.join()
    assert lock.acquire(timeout=30)
    lock.release()


def test_a_thread_may_fork_in_the_middle_of_a_visit(store):
    cache = ExpertCache(_copied(store), 4, {0: NUM_EXPERTS}, make_policy("lru"))
    with cache.turn, cache.visit(0, [1, 2, 3]) as visit:
        experts = iter(visit)
        assert next(experts)[1]["weight"].unique().item() == 1
        assert in_a_child(lambda: [weights["weight"].unique().item() for _, weights in experts]) == [2, 3]
        assert [weights["weight"].unique().item() for _, weights in experts] == [2, 3]


def test_several_threads_fork_at_once():
    found = []
    threads = [threading.Thread(target=lambda: found.append(in_a_child(lambda: True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_ctrl_c_while_the_main_thread_forks_comes_afterwards_and_no_lock_stays_taken():
    class Slow:
        """Waits at a fork, while Ctrl-C is pressed, once."""

        is_pressed = False

        def before_fork(self):
            if not self.is_pressed:
                self.is_pressed = True
                signal.raise_signal(signal.SIGINT)

        def after_fork(self, *, is_child):
            pass

    def fork_and_wait():
        assert in_a_child(lambda: lock.acquire(timeout=30))
        time.sleep(30)

    lock, slow = FORKS.with_lock(threading.RLock(), Rank.SHORT), Slow()
    FORKS.enter(slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fork_and_wait()
        assert in_another_thread(lambda: lock.acquire(timeout=30) and lock.release() is None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert in_a_child(lambda: True)
