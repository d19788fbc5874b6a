"""Ctrl-C between any two instructions of a visit leaves a cache that works, for this thread and for others."""

import os

import pytest
import torch

from ctrl_c import Interrupts, a_hang_is_a_failure, in_another_thread
from stores import number, numbered_store
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import LFRU, LRU
from transformers_moe_offload.slots.buffers import CopiedSlots, SlotPool
from transformers_moe_offload.slots.direct_io import DirectSlots
from transformers_moe_offload.slots.inline_reads import InlineReads
from transformers_moe_offload.slots.mapped import MappedSlots
from transformers_moe_offload.slots.transfer import HostCopier

from .caches import numbers_in

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS = 2, 6, 4
FOLDERS = ("cache", "disk_io", "policies", "slots", "store", "system")
CPU = torch.device("cpu")

EVERY = int(os.environ.get("MOE_OFFLOAD_INTERRUPT_EVERY", "127"))
"""Only every so manieth instruction is interrupted. With 1 all of them are, which takes half an hour."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return numbered_store(tmp_path_factory.mktemp("store"), NUM_LAYERS, NUM_EXPERTS)


def copied(store):
    return CopiedSlots(store, SlotPool(store.layout(0, 0).nbytes, CPU), HostCopier(store.fill, 2))


def small(store):
    copier = HostCopier(store.fill, 2, InlineReads(store).start)
    return CopiedSlots(store, SlotPool(store.layout(0, 0).nbytes, CPU), copier)


def mapped(store):
    return MappedSlots(store, 2)


def paged(store):
    spare = store.spare_bytes(0)
    return DirectSlots(store, store.layout(0, 0).nbytes + spare, spare, 2)


def paged_by_threads(store):
    slots = paged(store)
    slots.reader._queue = None  # as where the system offers no asynchronous reads
    return slots


def a_few_visits(cache):
    """Misses, evictions, hits, a load ahead that is used and one that is not, waves, other sizes."""
    visit(cache, 0, [0, 1, 2])
    cache.load_ahead(ExpertId(1, 5))
    visit(cache, 0, [1, 2], started=lambda wanted: cache.load_ahead(ExpertId(1, 3)))
    visit(cache, 1, [3, 4])
    visit(cache, 1, range(NUM_EXPERTS))
    cache.resize(NUM_SLOTS - 2)
    cache.resize(NUM_SLOTS)
    with cache.turn, cache.visit(0, [4, 2]) as opened:
        for expert, weights in opened.in_order():
            check(0, expert, weights)
    cache.give_back()


def visit(cache, layer, wanted, started=None):
    with cache.turn, cache.visit(layer, wanted, started) as opened:
        for batch in opened.batches():
            for expert, weights in batch.items():
                check(layer, expert, weights)


def check(layer, expert, weights):
    assert numbers_in(weights) == {number(ExpertId(layer, expert))}


def use_all(cache):
    """Ask for every expert, twice, in an order that moves all of them; returns whether all of it was right."""
    for layer in [*range(NUM_LAYERS), *range(NUM_LAYERS)]:
        visit(cache, layer, range(NUM_EXPERTS))
        visit(cache, layer, [2, 0])
    return True


def is_complete(cache):
    """Whether no slot is lost, and nothing is on its way for good."""
    with cache.turn:
        cache.settle()
    residents = list(cache.residency.residents)
    assert cache.num_loading == 0
    assert cache.residency.num_slots == NUM_SLOTS
    assert cache.residency.num_free + len(residents) == NUM_SLOTS
    assert sorted(cache._policy.candidates()) == sorted(residents)
    return True


@pytest.mark.parametrize("policy", [LRU, LFRU])
@pytest.mark.parametrize("slots", [copied, small, mapped, paged, paged_by_threads])
def test_a_visit_interrupted_at_any_instruction_leaves_a_cache_that_works(store, slots, policy):
    if policy is LFRU and slots is not copied:
        pytest.skip("one kind of slots is enough for a policy")
    counted = Interrupts(FOLDERS)
    with counted:
        a_few_visits(ExpertCache(slots(store), NUM_SLOTS, dict.fromkeys(range(NUM_LAYERS), NUM_EXPERTS), policy()))
    interrupted = 0
    for at in range(1, counted.count, EVERY):
        cache = ExpertCache(slots(store), NUM_SLOTS, dict.fromkeys(range(NUM_LAYERS), NUM_EXPERTS), policy())
        interrupts = Interrupts(FOLDERS, at)
        with a_hang_is_a_failure():
            try:
                with interrupts:
                    a_few_visits(cache)
            except KeyboardInterrupt:
                interrupted += 1
            try:
                assert in_another_thread(lambda cache=cache: use_all(cache))
                assert use_all(cache)
                if cache.residency.num_slots != NUM_SLOTS:  # broken off while it had another size
                    cache.resize(NUM_SLOTS)
                assert is_complete(cache)
            except BaseException as error:
                error.add_note(f"after an interrupt at {interrupts.place} ({at})")
                raise
    assert interrupted > 30
