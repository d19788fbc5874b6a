"""What every registered policy promises the cache, and what is peculiar to each."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import LRU, make_policy, policy_names, register_policy

each_policy = pytest.mark.parametrize("name", policy_names())

experts = st.builds(ExpertId, st.integers(0, 2), st.integers(0, 3))


class Residents(RuleBasedStateMachine):
    """Calls a policy as the cache does and keeps nothing but the set of residents."""

    @initialize(name=st.sampled_from(policy_names()))
    def start(self, name):
        self.policy = make_policy(name)
        self.residents = set()

    @rule(expert=experts)
    def load_and_use(self, expert):
        if expert not in self.residents:
            self.policy.admit(expert)
            self.residents.add(expert)
        self.policy.use(expert)

    @rule(expert=experts)
    def load_without_using(self, expert):
        if expert not in self.residents:
            self.policy.admit(expert)
            self.residents.add(expert)

    @precondition(lambda self: self.residents)
    @rule(data=st.data())
    def evict_any(self, data):
        expert = data.draw(st.sampled_from(sorted(self.residents)))
        self.policy.forget(expert)
        self.residents.remove(expert)

    @precondition(lambda self: self.residents)
    @rule()
    def evict_the_first_candidate(self):
        expert = next(iter(self.policy.candidates()))
        self.policy.forget(expert)
        self.residents.remove(expert)

    @invariant()
    def candidates_are_the_residents_each_once(self):
        if hasattr(self, "policy"):
            offered = list(self.policy.candidates())
            assert sorted(offered) == sorted(self.residents)

    @invariant()
    def asking_changes_nothing(self):
        if hasattr(self, "policy"):
            assert list(self.policy.candidates()) == list(self.policy.candidates())


TestResidents = Residents.TestCase
TestResidents.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


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
        policy.admit(expert)
        policy.use(expert)
        policy.forget(expert)
    policy.admit(expert)
    assert list(policy.candidates()) == [expert]


@each_policy
def test_looking_at_one_candidate_is_enough(name):
    """The planner stops as soon as it has found a victim."""
    policy = make_policy(name)
    for i in range(3):
        policy.admit(ExpertId(0, i))
    victim = next(iter(policy.candidates()))
    policy.forget(victim)
    assert len(list(policy.candidates())) == 2


@given(st.lists(st.tuples(st.sampled_from(["admit", "use", "forget"]), experts), max_size=40))
def test_lru_offers_the_residents_in_the_order_of_their_last_use(calls):
    policy, by_recency = LRU(), []
    for call, expert in calls:
        if (call == "admit") == (expert in by_recency):
            continue  # the cache never admits a resident, nor uses or forgets anybody else
        getattr(policy, call)(expert)
        if expert in by_recency:
            by_recency.remove(expert)
        if call != "forget":
            by_recency.append(expert)
    assert list(policy.candidates()) == by_recency


def test_an_unknown_policy_is_an_error_that_names_those_there_are():
    with pytest.raises(ConfigError, match=r"policy='lur' is not a known policy; choose one of \['lru'.*\]"):
        make_policy("lur")


def test_a_name_that_is_taken_is_refused_and_keeps_its_meaning():
    with pytest.raises(ConfigError, match="'lru' is already registered"):
        register_policy("lru")(object)
    assert isinstance(make_policy("lru"), LRU)


def test_a_taken_name_can_be_given_anew_on_purpose():
    register_policy("lru", exist_ok=True)(LRU)
    assert isinstance(make_policy("lru"), LRU)


def test_registering_hands_the_class_back_so_that_it_can_be_a_decorator():
    assert register_policy("lru", exist_ok=True)(LRU) is LRU
