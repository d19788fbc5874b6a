"""Loads of experts that no layer has asked for yet."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copiers import FakeCopier
from stores import number
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import LRU
from transformers_moe_offload.slots.buffers import CopiedSlots, SlotPool
from transformers_moe_offload.slots.inline_reads import Announced, InlineReads
from transformers_moe_offload.slots.transfer import HostCopier

from .caches import NUM_EXPERTS, NUM_LAYERS, visit_all


def cache_of(store, num_slots, copier=None, layers=NUM_LAYERS):
    slots = CopiedSlots(store, SlotPool(store.layout(0, 0).nbytes, torch.device("cpu")), copier or FakeCopier())
    return ExpertCache(slots, num_slots, dict.fromkeys(range(layers), NUM_EXPERTS), LRU())


def prefetches(cache, layer):
    return cache.stats[layer].prefetch_used, cache.stats[layer].prefetch_wasted


class Unhurried(FakeCopier):
    """Transfers that are not done, and have not begun, before a thread waits for them."""

    def start(self, expert, slot, alongside=0):
        super().start(expert, slot)
        return _Unhurried()


class _Unhurried:
    seconds = 0.0

    def is_done(self):
        return False

    def finish(self):
        return 0

    def cancel(self):
        return True


def test_an_expert_that_came_ahead_is_a_hit_and_was_worth_it(store):
    cache = cache_of(store, 6)
    assert cache.load_ahead(ExpertId(1, 4))
    visit_all(cache, 1, [4])
    assert (cache.stats[1].hits, cache.stats[1].misses) == (1, 0)
    assert prefetches(cache, 1) == (1, 0)


def test_an_expert_still_on_its_way_is_a_late_hit(store):
    cache = cache_of(store, 6, Unhurried())
    cache.load_ahead(ExpertId(1, 4))
    visit_all(cache, 1, [4])
    assert (cache.stats[1].hits, cache.stats[1].late_hits) == (0, 1)
    assert prefetches(cache, 1) == (1, 0)


def test_an_expert_that_came_ahead_for_nothing_is_counted_when_it_leaves(store):
    cache = cache_of(store, 6)
    visit_all(cache, 1, [0])
    cache.load_ahead(ExpertId(1, 4))
    visit_all(cache, 0, [0, 1])
    visit_all(cache, 2, [0, 1])
    visit_all(cache, 1, [0, 5])
    assert cache.is_absent(ExpertId(1, 4)), "never used, so the first to leave"
    assert prefetches(cache, 1) == (0, 1)


def test_using_it_twice_counts_once(store):
    cache = cache_of(store, 6)
    cache.load_ahead(ExpertId(1, 4))
    visit_all(cache, 1, [4])
    visit_all(cache, 1, [4])
    assert prefetches(cache, 1) == (1, 0)


def test_nobody_who_is_wanted_makes_room(store):
    cache = cache_of(store, 2, layers=1)
    with cache.turn, cache.visit(0, [0, 1]) as visit:
        for _ in visit:
            assert not cache.load_ahead(ExpertId(0, 5))


def test_nobody_on_the_way_makes_room_and_nobody_who_came_ahead(store):
    cache = cache_of(store, 3)
    visit_all(cache, 0, [0])
    visit_all(cache, 1, [0])
    assert cache.load_ahead(ExpertId(2, 5))
    assert not cache.load_ahead(ExpertId(2, 6)), "it would have to be 5 that leaves; the others are at their floor"


def test_it_takes_no_layer_below_its_floor(store):
    cache = cache_of(store, 6)
    for layer in (2, 0, 1):
        visit_all(cache, layer, [0, 1])
    assert cache.load_ahead(ExpertId(2, 5))
    assert [cache.residency.count(layer) for layer in range(NUM_LAYERS)] == [2, 2, 2]


def test_when_demand_needs_the_link_what_has_not_set_out_does_not_come(store):
    cache = cache_of(store, 6, Unhurried())
    visit_all(cache, 0, [0])
    for expert in (3, 4):
        cache.load_ahead(ExpertId(1, expert))
    visit_all(cache, 0, [1])
    assert cache.is_absent(ExpertId(1, 3))
    assert cache.is_absent(ExpertId(1, 4))
    assert prefetches(cache, 1) == (0, 0), "nothing was moved"


def test_what_demand_wants_is_not_cancelled(store):
    cache = cache_of(store, 6, Unhurried())
    for expert in (3, 4):
        cache.load_ahead(ExpertId(1, expert))
    assert sorted(visit_all(cache, 1, [3, 5])) == [3, 5]
    assert cache.is_absent(ExpertId(1, 4))
    assert prefetches(cache, 1) == (1, 0)


def test_a_visit_with_hits_only_leaves_them_on_their_way(store):
    cache = cache_of(store, 6, Unhurried())
    visit_all(cache, 0, [0])
    cache.load_ahead(ExpertId(1, 3))
    visit_all(cache, 0, [0])
    assert not cache.is_absent(ExpertId(1, 3))


def test_a_load_ahead_that_fails_troubles_nobody_until_somebody_wants_the_expert(store):
    copier = FakeCopier()
    cache = cache_of(store, 6, copier)
    copier.fail_on = {ExpertId(1, 3)}
    cache.load_ahead(ExpertId(1, 3))
    assert visit_all(cache, 0, [0]) == [0]
    assert cache.is_absent(ExpertId(1, 3))
    with pytest.raises(OSError, match="told to fail"):
        visit_all(cache, 1, [3])
    copier.fail_on = set()
    assert visit_all(cache, 1, [3]) == [3]
    assert prefetches(cache, 1) == (0, 0)


def test_another_threads_visit_is_not_waited_for(store):
    cache = cache_of(store, 6)
    with ThreadPoolExecutor(1) as pool, cache.turn, cache.visit(0, [0]) as visit:
        visit.take(0)
        assert pool.submit(cache.load_ahead, ExpertId(1, 3)).result(10) is False


steps = st.one_of(
    st.tuples(st.just("visit"), st.integers(0, NUM_LAYERS - 1), st.lists(st.integers(0, 7), min_size=1, unique=True)),
    st.tuples(st.just("ahead"), st.integers(0, NUM_LAYERS - 1), st.integers(0, 7)),
    st.tuples(st.just("resize"), st.integers(1, 12), st.none()),
)


class Cold(InlineReads):
    """The page cache has nothing when experts set out."""

    def start(self, expert, slot):
        return Announced(self._store, expert, slot)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(steps, max_size=20),
    num_slots=st.integers(1, 12),
    small=st.sampled_from([None, InlineReads, Cold]),
)
def test_whatever_comes_ahead_an_expert_asked_for_is_the_expert_handed_out(store, steps, num_slots, small):
    """Over real files, with reader threads and without; an expert that came ahead is used, wasted, or still there."""
    at_once = [small(store).start] if small is not None else []
    cache = cache_of(store, num_slots, HostCopier(store.fill, 2, *at_once))
    for kind, first, second in steps:
        if kind == "resize":
            cache.resize(first)
        elif kind == "ahead":
            if cache.is_absent(ExpertId(first, second)):
                cache.load_ahead(ExpertId(first, second))
        else:
            found = {}
            with cache.turn, cache.visit(first, second) as visit:
                for batch in visit.batches():
                    for expert, weights in batch.items():
                        found[expert] = {value for one in weights.values() for value in one.flatten().tolist()}
            assert found == {expert: {number(ExpertId(first, expert))} for expert in second}
        occupied = sum(cache.residency.count(layer) for layer in range(NUM_LAYERS))
        assert occupied + cache.residency.num_free == cache.residency.num_slots
