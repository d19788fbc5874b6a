"""What every policy promises the cache: one suite for all that are registered, and for the oracle."""

import math
import re
from collections import Counter
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import LRU, Belady, base, make_policy, policy_names, register_policy

each_policy = pytest.mark.parametrize("name", policy_names())

NUM_LAYERS, NUM_EXPERTS = 3, 4
EXPERTS = [ExpertId(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]

layers = st.integers(0, NUM_LAYERS - 1)
wishes = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True)
traces = st.lists(st.tuples(layers, wishes), max_size=25)


class Residents(RuleBasedStateMachine):
    """Calls a policy as the cache does and keeps only the residents and which of them were ever used."""

    @initialize(name=st.sampled_from(policy_names()))
    def start(self, name):
        self.policy = make_policy(name)
        self.residents = set()
        self.used = set()

    @rule(layer=layers, wanted=wishes, data=st.data())
    def visit(self, layer, wanted, data):
        wanted = [ExpertId(layer, expert) for expert in wanted]
        self.policy.begin(layer, wanted)
        for victim in list(self.policy.candidates())[: data.draw(st.integers(0, 2))]:
            if victim not in wanted:
                self.evict(victim)
        for expert in wanted:
            if expert not in self.residents:
                self.policy.admit(expert)
            self.policy.use(expert)
        self.residents.update(wanted)
        self.used.update(wanted)

    @rule(expert=st.sampled_from(EXPERTS))
    def prefetch(self, expert):
        if expert not in self.residents:
            self.policy.admit(expert)
            self.residents.add(expert)

    @precondition(lambda self: self.residents)
    @rule(data=st.data())
    def evict_any(self, data):
        self.evict(data.draw(st.sampled_from(sorted(self.residents))))

    @precondition(lambda self: self.residents)
    @rule()
    def evict_the_first_candidate(self):
        self.evict(next(self.policy.candidates()))

    def evict(self, expert):
        self.policy.forget(expert)
        self.residents.remove(expert)
        self.used.discard(expert)

    @invariant()
    def candidates_are_the_residents_each_once(self):
        if hasattr(self, "policy"):
            assert sorted(self.policy.candidates()) == sorted(self.residents)

    @invariant()
    def asking_changes_nothing(self):
        if hasattr(self, "policy"):
            assert list(self.policy.candidates()) == list(self.policy.candidates())

    @invariant()
    def who_came_ahead_of_demand_and_was_never_used_leaves_first(self):
        if hasattr(self, "policy"):
            was_used = [expert in self.used for expert in self.policy.candidates()]
            assert was_used == sorted(was_used)


TestResidents = Residents.TestCase
TestResidents.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def policy_for(name, visits):
    return Belady(visits) if name == "belady" else make_policy(name)


def play(policy, visits, num_slots):
    """Serve visits that fit into the slots, the first candidates leaving; yields the residents after each visit."""
    residents = set()
    for layer, wanted in visits:
        wanted = [ExpertId(layer, expert) for expert in wanted]
        policy.begin(layer, wanted)
        missing = [expert for expert in wanted if expert not in residents]
        leaving = (expert for expert in policy.candidates() if expert not in wanted)
        victims = [next(leaving) for _ in range(len(residents) + len(missing) - num_slots)]
        for victim in victims:
            policy.forget(victim)
        residents = (residents - set(victims)) | set(missing)
        for expert in sorted(wanted):
            if expert in missing:
                policy.admit(expert)
            policy.use(expert)
        yield set(residents)


@given(traces, st.sampled_from([*policy_names(), "belady"]))
@settings(deadline=None)
def test_the_order_in_which_a_request_names_experts_makes_no_difference(visits, name):
    num_slots = NUM_EXPERTS + 2
    backwards = [(layer, wanted[::-1]) for layer, wanted in visits]
    assert list(play(policy_for(name, visits), visits, num_slots)) == list(
        play(policy_for(name, backwards), backwards, num_slots)
    )


@given(traces, st.sampled_from([*policy_names(), "belady"]))
@settings(deadline=None)
def test_the_same_requests_lead_to_the_same_residents_and_the_same_order(visits, name):
    num_slots = NUM_EXPERTS + 1
    one, other = policy_for(name, visits), policy_for(name, visits)
    assert list(play(one, visits, num_slots)) == list(play(other, visits, num_slots))
    assert list(one.candidates()) == list(other.candidates())


@each_policy
def test_a_fresh_policy_offers_nobody(name):
    assert list(make_policy(name).candidates()) == []


@each_policy
def test_policies_made_by_name_share_nothing(name):
    one, other = make_policy(name), make_policy(name)
    one.admit(ExpertId(0, 0))
    assert list(other.candidates()) == []


@each_policy
def test_an_expert_may_leave_and_come_back(name):
    policy, expert = make_policy(name), ExpertId(0, 0)
    for _ in range(3):
        policy.begin(0, [expert])
        policy.admit(expert)
        policy.use(expert)
        policy.forget(expert)
    policy.admit(expert)
    assert list(policy.candidates()) == [expert]


# What it costs, in operations on experts, which do not depend on the machine.


OPERATIONS = Counter()


class Counting(ExpertId):
    """An expert that counts how often it is hashed or compared, which is how policies find and order experts."""

    def __hash__(self):
        OPERATIONS["all"] += 1
        return super().__hash__()

    def __eq__(self, other):
        OPERATIONS["all"] += 1
        return tuple(self) == tuple(other)

    def __lt__(self, other):
        OPERATIONS["all"] += 1
        return tuple(self) < tuple(other)


def operations_of_a_visit(name, num_slots, num_visits=60):
    """The average over visits that want 4 experts of a layer, in a cache that was full from the start."""
    num_layers, wanted_count = 4, 4
    stride = num_slots // wanted_count
    visits = [
        (turn % num_layers, [(turn * turn * 7 + turn + i * stride) % num_slots for i in range(wanted_count)])
        for turn in range(num_visits)
    ]
    policy, residents = make_policy(name), {}
    for turn in range(num_slots // wanted_count):
        layer, first = turn % num_layers, turn // num_layers * wanted_count
        wanted = [Counting(layer, first + i) for i in range(wanted_count)]
        policy.begin(layer, wanted)
        for expert in wanted:
            policy.admit(expert)
            policy.use(expert)
            residents[tuple(expert)] = expert
    OPERATIONS.clear()
    for layer, wanted in visits:
        experts = [residents.get((layer, expert), Counting(layer, expert)) for expert in wanted]
        policy.begin(layer, experts)
        leaving = (victim for victim in policy.candidates() if all(victim is not expert for expert in experts))
        missing = [expert for expert in experts if tuple(expert) not in residents]
        victims = [next(leaving) for _ in missing]
        for victim in victims:
            policy.forget(victim)
            del residents[tuple(victim)]
        for expert in experts:
            if any(expert is newcomer for newcomer in missing):
                policy.admit(expert)
                residents[tuple(expert)] = expert
            policy.use(expert)
    return OPERATIONS["all"] / num_visits


@each_policy
def test_what_a_visit_costs_grows_with_the_logarithm_of_the_slots_at_most(name):
    few, many = operations_of_a_visit(name, 128), operations_of_a_visit(name, 8192)
    assert few > 0
    assert many <= few * math.log2(8192) / math.log2(128) * 1.5


@pytest.fixture
def own_names(monkeypatch):
    """Policies that are registered are forgotten after the test."""
    monkeypatch.setattr(base, "_POLICIES", deepcopy(base._POLICIES))


def test_the_count_of_operations_catches_a_policy_that_sorts_all_residents(own_names):
    @register_policy("sorting")
    class Sorting(LRU):
        def candidates(self):
            return iter(sorted(super().candidates(), key=lambda expert: (hash(expert), expert)))

    assert operations_of_a_visit("sorting", 8192) > 20 * operations_of_a_visit("sorting", 128)


# Policies by name.


def test_the_policies_of_the_package_are_these():
    assert {"lru", "lfu", "lfru", "slru", "sieve", "least_stale", "random"} <= set(policy_names())


def test_an_unknown_policy_is_an_error_that_names_those_there_are():
    with pytest.raises(ConfigError, match=r"policy='lur' is not a known policy; choose one of \[.*'lru'.*\]"):
        make_policy("lur")


def test_the_oracle_is_no_policy_for_a_model_and_the_error_says_where_it_is_one():
    assert "belady" not in policy_names()
    with pytest.raises(ConfigError, match=r"needs future requests.*`moe-offload replay`"):
        make_policy("belady")


def test_the_name_of_the_oracle_cannot_be_taken():
    with pytest.raises(ConfigError, match="'belady' stands for the oracle"):
        register_policy("belady", exist_ok=True)(LRU)


def test_a_name_that_is_taken_is_refused_and_keeps_its_meaning():
    with pytest.raises(ConfigError, match="'lru' is already registered"):
        register_policy("lru")(object)
    assert isinstance(make_policy("lru"), LRU)


def test_a_taken_name_can_be_given_anew_on_purpose():
    register_policy("lru", exist_ok=True)(LRU)
    assert isinstance(make_policy("lru"), LRU)


def test_registering_hands_the_class_back_so_that_it_can_be_a_decorator():
    assert register_policy("lru", exist_ok=True)(LRU) is LRU


def test_a_policy_that_lacks_a_method_is_refused_before_anything_runs(own_names):
    class Incomplete:
        def admit(self, expert):
            pass

    register_policy("incomplete")(Incomplete)
    message = "policy='incomplete': Incomplete has no method begin, use, forget, candidates; add it"
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_policy("incomplete")
