import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import number, numbered_store
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.memory.slots import CopiedSlots, SlotPool
from transformers_moe_offload.memory.transfer import FakeCopier, HostCopier
from transformers_moe_offload.policies import LRU
from transformers_moe_offload.stats import LayerStats

NUM_LAYERS, NUM_EXPERTS = 3, 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return numbered_store(tmp_path_factory.mktemp("experts"), NUM_LAYERS, NUM_EXPERTS)


def cache_of(store, num_slots, copier=None, layers=(0,)):
    """A cache over FakeCopier, whose slots stay as they are, unless another copier is given."""
    slots = CopiedSlots(store, SlotPool(store.layout(0).nbytes, CPU), copier or FakeCopier())
    return ExpertCache(slots, num_slots, dict.fromkeys(layers, NUM_EXPERTS), LRU())


def reading_cache_of(store, num_slots, layers=(0,), workers=2):
    return cache_of(store, num_slots, HostCopier(store.read_into, workers), layers)


def visit_all(cache, layer, wanted):
    with cache.visit(layer, wanted) as visit:
        return [expert for expert, _ in visit]


def numbers_in(weights):
    """The distinct values in an expert's weights: one number if the weights are one expert's."""
    return {value for tensor in weights.values() for value in tensor.flatten().tolist()}


def counts(stats):
    return stats.hits, stats.late_hits, stats.misses


def residents(cache):
    return sorted(expert.expert for expert in cache.residency.residents())


# What is counted, loaded and yielded.


def test_a_trace_written_by_hand_has_exactly_these_hits_misses_and_loads(store):
    copier = FakeCopier()
    cache = cache_of(store, 3, copier)
    trace = [
        # wanted, yielded, loaded, (hits, misses) so far
        ([0, 1], [0, 1], [0, 1], (0, 2)),
        ([1, 2], [1, 2], [2], (1, 3)),  # the third slot
        ([3, 2], [2, 3], [3], (2, 4)),  # 0 leaves
        ([0], [0], [0], (2, 5)),  # 1 leaves
        ([3, 0, 2], [3, 0, 2], [], (5, 5)),
        ([4, 5], [4, 5], [4, 5], (5, 7)),  # 3 and 0 leave
        ([2], [2], [], (6, 7)),
    ]
    for wanted, yielded, loaded, (hits, misses) in trace:
        before = len(copier.started)
        assert visit_all(cache, 0, wanted) == yielded
        assert copier.started[before:] == [ExpertId(0, expert) for expert in loaded]
        assert counts(cache.stats[0]) == (hits, 0, misses)
    assert residents(cache) == [2, 4, 5]


def test_residents_come_first_and_the_absent_follow_in_the_order_asked_for(store):
    cache = cache_of(store, 4)
    visit_all(cache, 0, [5, 2])
    assert visit_all(cache, 0, [1, 2, 0, 5]) == [2, 5, 1, 0]


def test_all_loads_there_is_room_for_have_started_when_the_first_resident_is_handed_out(store):
    copier = FakeCopier()
    cache = cache_of(store, 3, copier)
    visit_all(cache, 0, [7])
    with cache.visit(0, [1, 2, 7]) as visit:
        expert, _ = next(iter(visit))
        assert expert == 7
        assert copier.started == [ExpertId(0, 7), ExpertId(0, 1), ExpertId(0, 2)]


def test_a_load_still_under_way_when_a_layer_asks_is_a_late_hit(store):
    cache = cache_of(store, 2)
    with cache.visit(0, [0, 1]) as visit:
        visit.take(0)
    visit_all(cache, 0, [0, 1])
    assert counts(cache.stats[0]) == (1, 1, 2)


def test_each_layer_counts_for_itself(store):
    cache = cache_of(store, 4, layers=(0, 1))
    visit_all(cache, 0, [0, 1])
    visit_all(cache, 1, [0])
    visit_all(cache, 0, [0])
    assert counts(cache.stats[0]) == (1, 0, 2)
    assert counts(cache.stats[1]) == (0, 0, 1)


def test_disk_bytes_count_what_was_stored_and_not_the_padding(store):
    cache = reading_cache_of(store, 2)
    visit_all(cache, 0, [0, 1, 2])
    assert cache.stats[0].disk_bytes == 3 * (2 * 3 * 4 + 3 * 2)
    assert cache.stats[0].device_bytes == 0


def test_a_visit_that_wants_nobody_does_nothing(store):
    cache = cache_of(store, 1)
    assert visit_all(cache, 0, []) == []
    assert cache.stats[0] == LayerStats()


def test_the_experts_of_two_layers_are_told_apart(store):
    cache = reading_cache_of(store, 4, layers=(0, 1))
    for layer in (0, 1, 0, 1):
        with cache.visit(layer, [0, 1]) as visit:
            for expert, weights in visit:
                assert numbers_in(weights) == {number(ExpertId(layer, expert))}


# More wanted than there are slots.


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
        with cache.visit(0, range(8)) as visit:
            for expert in range(8):
                assert numbers_in(visit.take(expert)) == {number(ExpertId(0, expert))}


def test_taking_the_held_expert_again_loads_nothing_and_gives_the_same_tensors(store):
    copier = FakeCopier()
    cache = cache_of(store, 1, copier)
    with cache.visit(0, [0, 1]) as visit:
        first = visit.take(0)
        assert visit.take(0) is first
        assert copier.started == [ExpertId(0, 0)]


def test_an_expert_taken_twice_is_loaded_again_if_it_had_to_leave(store):
    cache = reading_cache_of(store, 1)
    with cache.visit(0, [0, 1]) as visit:
        for expert in (0, 1, 0, 1, 1, 0):
            assert numbers_in(visit.take(expert)) == {number(ExpertId(0, expert))}


def test_an_expert_nobody_asked_for_is_not_handed_out(store):
    cache = cache_of(store, 2)
    with pytest.raises(AssertionError, match="was not asked for"), cache.visit(0, [0]) as visit:
        visit.take(1)
    assert not visit.wants(1)
    assert visit.wants(0)


def test_a_held_expert_is_never_evicted(store):
    """Whatever the loop body takes or another layer does later, the weights in hand stay what they are."""
    cache = reading_cache_of(store, 2)
    with cache.visit(0, range(8)) as visit:
        for expert, weights in visit:
            time.sleep(0.002)  # loads for the experts to come are under way
            assert numbers_in(weights) == {number(ExpertId(0, expert))}


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_after_taking_one_expert_a_visit_can_iterate_over_the_rest(store, num_slots):
    cache = reading_cache_of(store, num_slots)
    with cache.visit(0, [0, 1, 2]) as visit:
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

        def holds(self, slot):
            return slot not in self.taken_back

    copier = FakeCopier()
    slots = Borrowed(store, SlotPool(store.layout(0).nbytes, CPU), copier)
    cache = ExpertCache(slots, 3, {0: NUM_EXPERTS}, LRU())
    visit_all(cache, 0, [0, 1])
    slots.taken_back = {cache.residency.slot(ExpertId(0, 0))}
    visit_all(cache, 0, [0, 1])
    assert counts(cache.stats[0]) == (1, 0, 3)
    assert copier.started == [ExpertId(0, 0), ExpertId(0, 1), ExpertId(0, 0)]
    assert residents(cache) == [0, 1]


# Another number of slots.


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
        assert cache.slots.pool.nbytes == num_slots * store.layout(0).nbytes
        with cache.visit(0, range(8)) as visit:
            for expert, weights in visit:
                assert numbers_in(weights) == {number(ExpertId(0, expert))}


def test_a_cache_is_not_resized_under_somebody_who_uses_it(store):
    cache = reading_cache_of(store, 4)
    with cache.visit(0, range(8)) as visit:
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


# What goes wrong.


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
    with pytest.raises(ZeroDivisionError), cache.visit(0, [0, 1, 2, 3]) as visit:
        1 / (next(iter(visit))[0] * 0)
    assert residents(cache) == [0, 1, 2, 3]
    assert visit_all(cache, 0, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert counts(cache.stats[0]) == (4, 0, 4)


class NeverStarts(FakeCopier):
    """A copier out of threads."""

    def start(self, expert, slot):
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

    def start(self, expert, slot):
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
    """Six slots, a floor of one: five hold loads nobody waited for, the sixth the one of a layer at its floor."""
    cache = cache_of(store, 6, layers=(0, 1, 2))
    with cache.visit(0, range(6)) as visit:
        visit.take(0)
    assert visit_all(cache, 1, [0]) == [0]
    assert visit_all(cache, 2, [0]) == [0]


# Threads.


def test_threads_that_take_turns_all_get_the_weights_they_asked_for(store):
    cache = reading_cache_of(store, 3, layers=(0, 1, 2))
    wrong = []

    def run(seed):
        choose = random.Random(seed)
        for _ in range(60):
            layer = choose.randrange(NUM_LAYERS)
            wanted = choose.sample(range(NUM_EXPERTS), choose.randint(1, 5))
            with cache.visit(layer, wanted) as visit:
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
        with cache.visit(0, [1]):
            events.append("second")

    with cache.visit(0, [0]) as visit:
        thread = threading.Thread(target=second)
        thread.start()
        visit.take(0)
        thread.join(0.05)
        events.append("first")
    thread.join(10)
    assert events == ["first", "second"]


def test_the_turn_passes_on_after_a_visit_that_failed(store):
    cache = cache_of(store, 2)
    with pytest.raises(ZeroDivisionError), cache.visit(0, [0]):
        raise ZeroDivisionError
    got = []
    thread = threading.Thread(target=lambda: got.extend(visit_all(cache, 0, [1])))
    thread.start()
    thread.join(10)
    assert got == [1]


# Any trace.

wanted_lists = st.lists(st.permutations(range(NUM_EXPERTS)).flatmap(
    lambda order: st.integers(1, NUM_EXPERTS).map(lambda n: order[:n])
), min_size=1, max_size=12)  # fmt: skip


class ObviousLru:
    """The last `num_slots` different experts that were used are resident.

    All experts of a visit are used at once, in the order in which they were asked for; unless they are too many, then
    in the order in which they are handed out.
    """

    def __init__(self, num_slots):
        self.num_slots, self.recent, self.hits, self.misses = num_slots, [], 0, 0

    def visit(self, wanted):
        present = [expert for expert in wanted if expert in self.recent]
        absent = [expert for expert in wanted if expert not in self.recent]
        self.hits += len(present)
        self.misses += len(absent)
        order, used = present + absent, wanted
        if len(wanted) > self.num_slots:
            kept = [expert for expert in present if expert in wanted[-self.num_slots :]]
            kept = kept[-(self.num_slots - 2) :] if self.num_slots > 2 else []
            order = used = [expert for expert in order if expert not in kept] + kept
        self.recent = ([e for e in self.recent if e not in used] + list(used))[-self.num_slots :]
        return order, absent


@given(trace=wanted_lists, num_slots=st.integers(1, NUM_EXPERTS + 1))
def test_one_layer_under_lru_does_what_the_obvious_model_does(store, trace, num_slots):
    copier = FakeCopier()
    cache, model = cache_of(store, num_slots, copier), ObviousLru(num_slots)
    for wanted in trace:
        order, absent = model.visit(wanted)
        copier.started.clear()
        assert visit_all(cache, 0, wanted) == order
        assert copier.started == [ExpertId(0, expert) for expert in absent]
        assert residents(cache) == sorted(model.recent)
        assert counts(cache.stats[0]) == (model.hits, 0, model.misses)


visits = st.tuples(
    st.integers(0, NUM_LAYERS - 1),
    st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True),
    st.sampled_from(["iterate", "take", "stop early", "raise"]),
)


@settings(deadline=None, max_examples=60)
@given(
    trace=st.lists(visits, max_size=12),
    num_slots=st.integers(1, 8),
    failing=st.sets(st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, NUM_EXPERTS - 1)), max_size=2),
)
def test_whatever_happens_an_expert_asked_for_is_the_expert_handed_out(store, trace, num_slots, failing):
    """Over real files and reader threads, with visits that end early, visits that raise, and reads that fail."""

    def read(expert, slot):
        if expert in failing:
            raise OSError("unreadable")
        return store.read_into(expert, slot)

    cache = cache_of(store, num_slots, HostCopier(read, workers=2), layers=range(NUM_LAYERS))
    for layer, wanted, how in trace:
        try:
            with cache.visit(layer, wanted) as visit:
                pairs = ((e, visit.take(e)) for e in wanted) if how == "take" else iter(visit)
                seen = []
                for expert, weights in pairs:
                    assert numbers_in(weights) == {number(ExpertId(layer, expert))}
                    seen.append(expert)
                    if how == "stop early":
                        break
                    if how == "raise":
                        raise ZeroDivisionError  # noqa: TRY301 - it is to leave the visit
                assert how == "stop early" or sorted(seen) == sorted(wanted)
        except ZeroDivisionError:
            pass
        except OSError:
            assert {(layer, expert) for expert in wanted} & failing
        occupied = sum(cache.residency.count(each) for each in range(NUM_LAYERS))
        assert occupied + cache.residency.num_free == num_slots == len(cache.slots.pool)


def test_the_bytes_of_a_cache_are_those_of_its_slots_however_many_experts_pass_through(store):
    cache = reading_cache_of(store, 2)
    slots = {cache.slots.pool.record(i).data_ptr() for i in range(2)}
    with cache.visit(0, range(8)) as visit:
        for _, weights in visit:
            assert min(tensor.data_ptr() for tensor in weights.values()) in slots
    assert cache.slots.pool.nbytes == 2 * store.layout(0).nbytes
