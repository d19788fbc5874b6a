"""Loads that fail, visits that end early, and threads that want the cache at the same time."""

import random
import threading

import pytest

from copiers import FakeCopier
from stores import number
from transformers_moe_offload.expert import ExpertId

from .caches import NUM_EXPERTS, NUM_LAYERS, cache_of, counts, numbers_in, reading_cache_of, residents, visit_all


def test_a_load_that_fails_raises_and_leaves_the_expert_absent_and_its_slot_free(store):
    copier = FakeCopier()
    cache = cache_of(store, 2, copier)
    copier.fail_on = {ExpertId(0, 1)}
    with pytest.raises(OSError, match="told to fail"):
        visit_all(cache, 0, [0, 1])
    assert cache.residency.is_absent(ExpertId(0, 1))
    assert cache.residency.num_free == 1
    copier.fail_on = set()
    assert visit_all(cache, 0, [0, 1]) == [0, 1]
    assert counts(cache.stats[0]) == (1, 0, 3)


def test_a_failed_load_is_not_counted_as_bytes_read(store):
    copier = FakeCopier()
    copier.fail_on = {ExpertId(0, 0)}
    cache = cache_of(store, 1, copier)
    with pytest.raises(OSError, match="told to fail"):
        visit_all(cache, 0, [0])
    assert cache.stats[0].disk_bytes == 0


def test_every_load_of_a_visit_may_fail_and_the_cache_is_empty_but_whole(store):
    copier = FakeCopier()
    copier.fail_on = {ExpertId(0, expert) for expert in range(8)}
    cache = cache_of(store, 3, copier)
    with pytest.raises(OSError, match="told to fail"):
        visit_all(cache, 0, range(8))
    assert cache.residency.num_free == 3
    copier.fail_on = set()
    assert visit_all(cache, 0, range(8)) == list(range(8))


def test_an_error_in_the_middle_of_a_visit_leaves_nothing_in_flight(store):
    cache = cache_of(store, 4)
    with pytest.raises(ZeroDivisionError), cache.turn, cache.visit(0, [0, 1, 2, 3]) as visit:
        1 / (next(iter(visit))[0] * 0)
    assert residents(cache) == [0, 1, 2, 3]
    assert visit_all(cache, 0, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert counts(cache.stats[0]) == (4, 0, 4)


class NeverStarts(FakeCopier):
    """A copier out of threads."""

    def start(self, expert, slot, alongside=0):
        raise RuntimeError("can't start new thread")


def test_a_copier_that_cannot_start_leaves_the_expert_absent_and_its_slot_free(store):
    cache = cache_of(store, 2, NeverStarts())
    with pytest.raises(RuntimeError, match="can't start"):
        visit_all(cache, 0, [0])
    assert cache.residency.is_absent(ExpertId(0, 0))
    assert cache.residency.num_free == 2


class InterruptedOnce(FakeCopier):
    """A copier whose first wait the user breaks off with Ctrl-C, while the transfer goes on."""

    def __init__(self):
        super().__init__()
        self.unfinished = {}

    def start(self, expert, slot, alongside=0):
        assert slot.data_ptr() not in self.unfinished.values(), "the slot is still being filled with another expert"
        self.unfinished[expert] = slot.data_ptr()
        self.started.append(expert)
        return _InterruptedOnce(self, expert, len(self.started) == 1)


class _InterruptedOnce:
    seconds = 0.0

    def __init__(self, copier, expert, interrupts):
        self.copier, self.expert, self.interrupts = copier, expert, interrupts

    def is_done(self):
        return not self.interrupts

    def finish(self):
        if self.interrupts:
            self.interrupts = False
            raise KeyboardInterrupt
        del self.copier.unfinished[self.expert]
        return 0

    def cancel(self):
        return False


def test_a_slot_whose_load_was_only_waited_for_in_vain_is_not_given_to_another_expert(store):
    """Ctrl-C ends the wait, not the read: a reader thread may go on writing into the slot."""
    cache = cache_of(store, 1, InterruptedOnce())
    with pytest.raises(KeyboardInterrupt):
        visit_all(cache, 0, [0])
    assert visit_all(cache, 0, [1]) == [1]


def test_loads_left_behind_by_visits_that_ended_early_starve_no_other_layer(store):
    """Six slots, a floor of one: five hold loads without a wait, the sixth the one of a layer at its floor."""
    cache = cache_of(store, 6, layers=(0, 1, 2))
    with cache.turn, cache.visit(0, range(6)) as visit:
        visit.take(0)
    assert visit_all(cache, 1, [0]) == [0]
    assert visit_all(cache, 2, [0]) == [0]


def test_threads_that_take_turns_all_get_the_weights_they_asked_for(store):
    cache = reading_cache_of(store, 3, layers=(0, 1, 2))
    wrong = []

    def run(seed):
        choose = random.Random(seed)
        for _ in range(60):
            layer = choose.randrange(NUM_LAYERS)
            wanted = choose.sample(range(NUM_EXPERTS), choose.randint(1, 5))
            with cache.turn, cache.visit(layer, wanted) as visit:
                got = {expert: numbers_in(weights) for expert, weights in visit}
            if got != {expert: {number(ExpertId(layer, expert))} for expert in wanted}:
                wrong.append((layer, wanted, got))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)


def test_a_visit_waits_until_another_threads_visit_has_ended(store):
    cache = cache_of(store, 2)
    events = []

    def second():
        with cache.turn, cache.visit(0, [1]):
            events.append("second")

    with cache.turn, cache.visit(0, [0]) as visit:
        thread = threading.Thread(target=second)
        thread.start()
        visit.take(0)
        thread.join(0.05)
        events.append("first")
    thread.join(10)
    assert events == ["first", "second"]


def test_the_turn_passes_on_after_a_visit_that_failed(store):
    cache = cache_of(store, 2)
    with pytest.raises(ZeroDivisionError), cache.turn, cache.visit(0, [0]):
        raise ZeroDivisionError
    got = []
    thread = threading.Thread(target=lambda: got.extend(visit_all(cache, 0, [1])))
    thread.start()
    thread.join(10)
    assert got == [1]
