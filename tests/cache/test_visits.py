"""Visits that want more than there are slots, and caches whose slots become more or fewer."""

import threading
import time

import pytest

from copiers import FakeCopier
from stores import number
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import LRU
from transformers_moe_offload.slots.buffers import CopiedSlots, SlotPool

from .caches import CPU, NUM_EXPERTS, cache_of, counts, numbers_in, reading_cache_of, residents, visit_all


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_more_experts_than_slots_pass_in_waves_each_once(store, num_slots):
    copier = FakeCopier()
    cache = cache_of(store, num_slots, copier)
    assert visit_all(cache, 0, range(8)) == list(range(8))
    assert copier.started == [ExpertId(0, expert) for expert in range(8)]
    assert residents(cache) == list(range(8 - num_slots, 8))


def test_a_resident_is_used_before_it_has_to_leave_for_the_next_wave(store):
    copier = FakeCopier()
    cache = cache_of(store, 2, copier)
    visit_all(cache, 0, [6, 7])
    assert visit_all(cache, 0, range(8)) == [6, 7, 0, 1, 2, 3, 4, 5]
    assert len(copier.started) == 8, "6 and 7 are not loaded again"


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_experts_can_be_taken_in_ascending_order_whatever_is_resident(store, num_slots):
    for first in ([7], [7, 0], [3, 5, 1], []):
        cache = reading_cache_of(store, num_slots)
        visit_all(cache, 0, first)
        with cache.turn, cache.visit(0, range(8)) as visit:
            for expert in range(8):
                assert numbers_in(visit.take(expert)) == {number(ExpertId(0, expert))}


def test_taking_the_held_expert_again_loads_nothing_and_gives_the_same_tensors(store):
    copier = FakeCopier()
    cache = cache_of(store, 1, copier)
    with cache.turn, cache.visit(0, [0, 1]) as visit:
        first = visit.take(0)
        assert visit.take(0) is first
        assert copier.started == [ExpertId(0, 0)]


def test_an_expert_taken_twice_is_loaded_again_if_it_had_to_leave(store):
    cache = reading_cache_of(store, 1)
    with cache.turn, cache.visit(0, [0, 1]) as visit:
        for expert in (0, 1, 0, 1, 1, 0):
            assert numbers_in(visit.take(expert)) == {number(ExpertId(0, expert))}


def test_an_expert_nobody_asked_for_is_not_handed_out(store):
    cache = cache_of(store, 2)
    with pytest.raises(AssertionError, match="was not asked for"), cache.turn, cache.visit(0, [0]) as visit:
        visit.take(1)
    assert not visit.wants(1)
    assert visit.wants(0)


def test_a_held_expert_is_never_evicted(store):
    """Whatever the loop body takes or another layer does later, the weights in hand stay what they are."""
    cache = reading_cache_of(store, 2)
    with cache.turn, cache.visit(0, range(8)) as visit:
        for expert, weights in visit:
            time.sleep(0.002)  # loads for the experts to come are under way
            assert numbers_in(weights) == {number(ExpertId(0, expert))}


class InTheirTime(FakeCopier):
    """Transfers that are done when they are told to be, or when a thread waits for them."""

    def __init__(self):
        super().__init__()
        self.done = set()

    def start(self, expert, slot, alongside=0):
        transfer = super().start(expert, slot)
        transfer.is_done = lambda: expert.expert in self.done
        return transfer


def test_what_is_there_is_used_together_and_the_rest_as_it_lands(store):
    copier = InTheirTime()
    cache = cache_of(store, 8, copier)
    visit_all(cache, 0, [3, 5])
    copier.done = {1}
    with cache.turn, cache.visit(0, [1, 2, 3, 4, 5, 6, 7]) as visit:
        batches = visit.batches()
        assert list(next(batches)) == [3, 5, 1], "residents, and what has landed by now"
        copier.done = {4, 6}
        rest = [list(batch) for batch in batches]
    assert rest == [[4, 6], [2], [7]]
    assert counts(cache.stats[0]) == (2, 0, 7)


def test_what_passes_in_waves_is_used_one_by_one(store):
    cache = cache_of(store, 3)
    with cache.turn, cache.visit(0, range(8)) as visit:
        assert [list(batch) for batch in visit.batches()] == [[expert] for expert in range(8)]


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_after_taking_one_expert_a_visit_can_iterate_over_the_rest(store, num_slots):
    cache = reading_cache_of(store, num_slots)
    with cache.turn, cache.visit(0, [0, 1, 2]) as visit:
        visit.take(1)
        rest = {expert: numbers_in(weights) for expert, weights in visit}
    assert rest == {expert: {number(ExpertId(0, expert))} for expert in (0, 2)}


def test_a_layer_keeps_its_floor_through_another_layers_long_prompt(store):
    cache = cache_of(store, 8, layers=(0, 1))
    visit_all(cache, 0, range(4))
    visit_all(cache, 1, range(8))
    assert cache.residency.count(0) == 4, "an equal share of 8 slots"
    assert cache.residency.count(1) == 4


def test_a_long_prompt_leaves_the_experts_that_its_last_tokens_wanted(store):
    """They are asked for last, whether they were resident before or not, and none is loaded twice."""
    copier = FakeCopier()
    cache = cache_of(store, 5, copier)
    visit_all(cache, 0, [6, 2, 5, 7, 3])
    visit_all(cache, 0, [2])
    copier.started.clear()
    visit_all(cache, 0, [2, 3, 0, 1, 4, 5, 6, 7])
    assert residents(cache) == [1, 4, 5, 6, 7]
    assert copier.started == [ExpertId(0, expert) for expert in (0, 1, 4)]


def test_what_is_resident_after_a_visit_does_not_depend_on_what_arrived_first(store):
    """Among experts asked for together the policy is told of those asked for first, first."""
    for loaded_before in ([], [2], [0, 1], [2, 1]):
        cache = cache_of(store, 3)
        visit_all(cache, 0, loaded_before)
        visit_all(cache, 0, [1, 0, 2])
        visit_all(cache, 0, [5])
        assert residents(cache) == [0, 2, 5], "1 is the one that had gone unused for longest"


def test_an_expert_that_the_system_took_back_is_a_miss_and_comes_in_again(store):
    class Borrowed(CopiedSlots):
        taken_back = frozenset()

        def lost(self, slots):
            return [slot for slot in slots if slot in self.taken_back]

    copier = FakeCopier()
    slots = Borrowed(store, SlotPool(store.layout(0, 0).nbytes, CPU), copier)
    cache = ExpertCache(slots, 3, {0: NUM_EXPERTS}, LRU())
    visit_all(cache, 0, [0, 1])
    slots.taken_back = {cache.residency.slot(ExpertId(0, 0))}
    visit_all(cache, 0, [0, 1])
    assert counts(cache.stats[0]) == (1, 0, 3)
    assert copier.started == [ExpertId(0, 0), ExpertId(0, 1), ExpertId(0, 0)]
    assert residents(cache) == [0, 1]


def test_a_cache_that_grows_keeps_its_residents(store):
    cache = cache_of(store, 2)
    visit_all(cache, 0, [0, 1])
    cache.resize(4)
    visit_all(cache, 0, [2, 3])
    assert residents(cache) == [0, 1, 2, 3]
    assert len(cache.slots.pool) == 4


def test_a_cache_that_shrinks_lets_go_who_the_policy_says(store):
    cache = cache_of(store, 4)
    visit_all(cache, 0, [3, 0, 1, 2])
    cache.resize(2)
    assert residents(cache) == [1, 2]
    assert len(cache.slots.pool) == 2
    visit_all(cache, 0, [5])
    assert residents(cache) == [2, 5]


def test_a_cache_that_shrinks_and_grows_holds_the_right_experts(store):
    cache = reading_cache_of(store, 6)
    for num_slots in (6, 1, 3, 2, 8, 1, 5):
        cache.resize(num_slots)
        assert cache.slots.pool.nbytes == num_slots * store.layout(0, 0).nbytes
        with cache.turn, cache.visit(0, range(8)) as visit:
            for expert, weights in visit:
                assert numbers_in(weights) == {number(ExpertId(0, expert))}


def test_a_cache_is_not_resized_under_somebody_who_uses_it(store):
    cache = reading_cache_of(store, 4)
    with cache.turn, cache.visit(0, range(8)) as visit:
        iterator = iter(visit)
        _, weights = next(iterator)
        thread = threading.Thread(target=cache.resize, args=(1,))
        thread.start()
        thread.join(0.05)
        assert numbers_in(weights) == {number(ExpertId(0, 0))}
        assert cache.residency.num_slots == 4
        list(iterator)
    thread.join(10)
    assert cache.residency.num_slots == 1


def test_the_policy_is_told_of_residents_in_the_order_in_which_they_were_asked_for(store):
    cache = cache_of(store, 3)
    visit_all(cache, 0, [0, 1, 2])
    with cache.turn, cache.visit(0, [2, 0, 1]) as visit:
        assert [expert for expert, _ in visit.in_order()] == [0, 1, 2]
    assert [expert.expert for expert in cache._policy.candidates()] == [2, 0, 1]
