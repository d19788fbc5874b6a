"""Every policy in the cache it is made for: whatever order it gives, the promises of cache and planner hold."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.cache.capacity import layer_floor
from transformers_moe_offload.cache.planner import plan
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import Belady, make_policy, policy_names
from transformers_moe_offload.slots.transfer import Landed
from transformers_moe_offload.tracing.replay import NoSlots

NUM_LAYERS, NUM_EXPERTS = 3, 6

policies = st.sampled_from([*policy_names(), "belady"])
traces = st.lists(
    st.tuples(st.integers(0, NUM_LAYERS - 1), st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True)),
    max_size=20,
)


class Held(dict):
    """The weights in the slots of a witness, which is told whose are taken."""

    def __init__(self, witness):
        self.witness = witness

    def __getitem__(self, slot):
        assert slot in self.witness.inside
        self.witness.held = slot
        return {}


class Witness(NoSlots):
    """Slots that keep which expert is in them, and raise at what would corrupt weights."""

    def __init__(self):
        self.inside = {}
        self.held = None

    @property
    def weights(self):
        return Held(self)

    def start(self, expert, slot, alongside=0):
        assert slot != self.held, f"{expert} overwrites {self.inside[slot]}, which is held"
        assert expert not in self.inside.values(), f"{expert} is brought into a second slot"
        self.inside[slot] = expert
        return Landed(from_files=0)

    def retire(self, slots):
        self.held = None


class Watched:
    """A policy that notes which expert is evicted, because slots are not called then."""

    def __init__(self, policy, witness):
        self.begin, self.admit, self.use, self.candidates = policy.begin, policy.admit, policy.use, policy.candidates
        self.policy = policy
        self.witness = witness

    def forget(self, expert):
        slot = next(slot for slot, inside in self.witness.inside.items() if inside == expert)
        assert slot != self.witness.held, f"{expert} is evicted while it is held"
        del self.witness.inside[slot]
        self.policy.forget(expert)


def policy_for(name, visits):
    return Belady(visits) if name == "belady" else make_policy(name)


def cache_with(policy, slots, num_slots):
    return ExpertCache(slots, num_slots, dict.fromkeys(range(NUM_LAYERS), NUM_EXPERTS), policy)


@given(policies, traces, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_nobody_is_in_two_slots_and_nobody_held_is_evicted(name, visits, num_slots):
    slots = Witness()
    policy = Watched(policy_for(name, visits), slots)
    cache = cache_with(policy, slots, num_slots)
    for layer, wanted in visits:
        with cache.turn, cache.visit(layer, wanted) as visit:
            assert sorted(expert for expert, _ in visit) == sorted(wanted)
        residents = sorted(cache.residency.residents)
        assert residents == sorted(slots.inside.values()) == sorted(policy.candidates())
        assert len(residents) <= num_slots


@given(policies, traces, st.integers(NUM_LAYERS, 12))
@settings(max_examples=100, deadline=None)
def test_no_other_layer_takes_a_layer_below_its_floor(name, visits, num_slots):
    cache = cache_with(policy_for(name, visits), NoSlots(), num_slots)
    floor = layer_floor(num_slots, NUM_LAYERS)
    for layer, wanted in visits:
        before = Counter(expert.layer for expert in cache.residency.residents)
        with cache.turn, cache.visit(layer, wanted) as visit:
            list(visit)
        after = Counter(expert.layer for expert in cache.residency.residents)
        for other in set(before) - {layer}:
            assert after[other] >= min(before[other], floor)


@given(policies, traces, st.integers(1, 12), st.integers(0, NUM_LAYERS - 1))
@settings(max_examples=100, deadline=None)
def test_a_plan_changes_nothing_whether_it_succeeds_or_has_to_defer(name, visits, num_slots, layer):
    policy = policy_for(name, visits)
    cache = cache_with(policy, NoSlots(), num_slots)
    for visited, wanted in visits:
        with cache.turn, cache.visit(visited, wanted) as visit:
            list(visit)
    before = list(policy.candidates())
    upcoming = [ExpertId(layer, expert) for expert in range(NUM_EXPERTS)]
    planned = plan(upcoming, cache.residency, policy.candidates(), floor=num_slots)
    assert list(policy.candidates()) == before
    assert sorted(cache.residency.residents) == sorted(before)
    assert plan(upcoming, cache.residency, policy.candidates(), floor=num_slots) == planned


@pytest.mark.parametrize("name", policy_names())
def test_a_load_that_cannot_start_leaves_a_policy_that_goes_on_working(name):
    class Broken(NoSlots):
        def start(self, expert, slot, alongside=0):
            if expert.expert == 5:
                raise OSError
            return Landed(from_files=0)

    policy = make_policy(name)
    cache = cache_with(policy, Broken(), 4)
    for wanted in ([0, 1], [2, 3], [1, 5], [0, 4]):
        try:
            with cache.turn, cache.visit(0, wanted) as visit:
                list(visit)
        except OSError:
            assert 5 in wanted
        assert sorted(policy.candidates()) == sorted(cache.residency.residents)
