"""What a cache counts, loads and hands out, by hand and against an obvious model."""

from hypothesis import given, settings
from hypothesis import strategies as st

from copiers import FakeCopier
from stores import number
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.transfer import HostCopier
from transformers_moe_offload.stats import LayerStats
from transformers_moe_offload.store.record import whole

from .caches import NUM_EXPERTS, NUM_LAYERS, cache_of, counts, numbers_in, reading_cache_of, residents, visit_all


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
    with cache.turn, cache.visit(0, [1, 2, 7]) as visit:
        expert, _ = next(iter(visit))
        assert expert == 7
        assert copier.started == [ExpertId(0, 7), ExpertId(0, 1), ExpertId(0, 2)]


def test_a_load_still_under_way_when_a_layer_asks_is_a_late_hit(store):
    cache = cache_of(store, 2)
    with cache.turn, cache.visit(0, [0, 1]) as visit:
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
        with cache.turn, cache.visit(layer, [0, 1]) as visit:
            for expert, weights in visit:
                assert numbers_in(weights) == {number(ExpertId(layer, expert))}


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

    cache = cache_of(
        store, num_slots, HostCopier(whole(read, store.layout(0, 0).nbytes), workers=2), layers=range(NUM_LAYERS)
    )
    for layer, wanted, how in trace:
        try:
            with cache.turn, cache.visit(layer, wanted) as visit:
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
    with cache.turn, cache.visit(0, range(8)) as visit:
        for _, weights in visit:
            assert min(tensor.data_ptr() for tensor in weights.values()) in slots
    assert cache.slots.pool.nbytes == 2 * store.layout(0, 0).nbytes
