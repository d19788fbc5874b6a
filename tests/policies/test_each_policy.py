"""What is peculiar to each policy: the order it gives, against the obvious way to work it out."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import LFRU, LFU, LRU, SLRU, Belady, LeastStale, Random, Sieve, lfu

SINGLES = st.lists(st.integers(0, 7), max_size=60)
"""Experts of one layer, asked for one at a time."""


def ask(policy, layer, *wanted):
    """A visit for which there is room."""
    experts = [ExpertId(layer, expert) for expert in wanted]
    policy.begin(layer, experts)
    residents = set(policy.candidates())
    for expert in experts:
        if expert not in residents:
            policy.admit(expert)
        policy.use(expert)


def order(policy):
    """Layer and expert of the candidates, written as `layer.expert`."""
    return " ".join(f"{layer}.{expert}" for layer, expert in policy.candidates())


def victims_of(policy, requests, num_slots):
    """The expert that is evicted at each miss, when one is asked for at a time."""
    residents, victims = set(), []
    for expert in (ExpertId(0, number) for number in requests):
        policy.begin(0, [expert])
        if expert not in residents:
            if len(residents) == num_slots:
                victim = next(policy.candidates())
                policy.forget(victim)
                residents.remove(victim)
                victims.append(victim.expert)
            policy.admit(expert)
            residents.add(expert)
        policy.use(expert)
    return victims


@given(st.lists(st.tuples(st.sampled_from(["use", "forget"]), st.integers(0, 5)), max_size=40))
def test_lru_offers_the_residents_in_the_order_of_their_last_use(calls):
    policy, by_recency = LRU(), []
    for call, number in calls:
        expert = ExpertId(0, number)
        if call == "use":
            if expert not in by_recency:
                policy.admit(expert)
            policy.use(expert)
        elif expert in by_recency:
            policy.forget(expert)
        by_recency = [e for e in by_recency if e != expert] + [expert] * (call == "use")
    assert list(policy.candidates()) == by_recency


@given(SINGLES)
def test_lfu_offers_the_residents_in_the_order_of_their_decayed_uses(requests):
    policy, passes = LFU(), {}
    for now, number in enumerate(requests):
        ask(policy, 0, number)
        passes.setdefault(number, []).append(now)
    uses = {
        number: sum(2 ** ((then - len(requests)) / lfu.HALF_LIFE) for then in thens) for number, thens in passes.items()
    }
    offered = [uses[expert.expert] for expert in policy.candidates()]
    assert offered == pytest.approx(sorted(uses.values()))


def test_lfu_counts_uses_before_an_expert_left_and_forgets_them_in_time():
    policy = LFU()
    for _ in range(5):
        ask(policy, 0, 1)
    policy.forget(ExpertId(0, 1))
    ask(policy, 0, 2)
    ask(policy, 0, 1)
    assert order(policy) == "0.2 0.1"
    for _ in range(8 * lfu.HALF_LIFE):
        ask(policy, 0)
    ask(policy, 0, 2)
    assert order(policy) == "0.1 0.2"


def test_lfru_lets_a_frequent_expert_grow_older_than_a_rare_one_but_not_for_ever():
    policy = LFRU()
    for _ in range(4):
        ask(policy, 0, 1)
    ask(policy, 0, 2)
    ask(policy, 0)
    assert order(policy) == "0.2 0.1"  # age 1, used once; age 2, used four times
    for _ in range(20):
        ask(policy, 0)
    ask(policy, 0, 2)
    ask(policy, 0)
    assert order(policy) == "0.1 0.2"  # age 23, used four times; age 1, used twice


def test_slru_protects_who_is_used_again():
    policy = SLRU()
    ask(policy, 0, 1, 2, 3, 4, 5)
    ask(policy, 0, 1, 2)
    ask(policy, 0, 6)
    assert order(policy) == "0.3 0.4 0.5 0.6 0.1 0.2"


@given(SINGLES)
def test_slru_never_protects_so_many_that_nobody_is_on_probation(requests):
    policy = SLRU()
    for number in requests:
        ask(policy, 0, number)
        residents = list(policy.candidates())
        assert residents[0] not in policy._protected
        assert len(policy._protected) <= 0.8 * len(residents)


@given(SINGLES, st.integers(1, 5))
def test_sieve_evicts_whom_the_algorithm_of_the_paper_evicts(requests, num_slots):
    """Figure 2 of Zhang et al., with a list from the newest to the oldest."""
    queue, marked, hand, victims = [], set(), None, []
    for number in requests:
        if number in queue:
            marked.add(number)
            continue
        if len(queue) == num_slots:
            place = len(queue) - 1 if hand is None else queue.index(hand)
            while queue[place] in marked:
                marked.remove(queue[place])
                place = place - 1 if place else len(queue) - 1
            victims.append(queue[place])
            hand = queue[place - 1] if place else None
            del queue[place]
        queue.insert(0, number)
    assert victims_of(Sieve(), requests, num_slots) == victims


def test_least_stale_offers_the_stale_then_the_current_then_those_ahead_from_the_last_layer_on():
    policy = LeastStale()
    for layer in range(4):
        ask(policy, layer, 0, 1)
    ask(policy, 0, 1)
    ask(policy, 1, 1, 2)
    assert order(policy) == "0.0 1.0 0.1 1.1 1.2 3.0 3.1 2.0 2.1"
    ask(policy, 0)
    assert order(policy).startswith("0.0 0.1 ")


def test_where_lru_evicts_what_comes_next_least_stale_keeps_it():
    """Two layers that want the same every time, and a third that wants something else every time."""
    policies = {"lru": LRU(), "least_stale": LeastStale()}
    for policy in policies.values():
        ask(policy, 0, 0)
        ask(policy, 1, 0)
        ask(policy, 2, 0)
        policy.begin(0, [ExpertId(0, 0)])
        policy.use(ExpertId(0, 0))
        policy.begin(1, [ExpertId(1, 0)])
    assert order(policies["lru"]) == "1.0 2.0 0.0"
    assert order(policies["least_stale"]) == "1.0 0.0 2.0"


def test_random_lets_anybody_go_first_about_equally_often():
    policy = Random()
    ask(policy, 0, *range(4))
    first = Counter()
    for _ in range(400):
        victim = next(policy.candidates())
        first[victim.expert] += 1
        policy.forget(victim)
        ask(policy, 0, victim.expert)
    assert sorted(first) == [0, 1, 2, 3]
    assert min(first.values()) > 70


def test_random_offers_everybody_in_any_order():
    policy = Random()
    ask(policy, 0, *range(3))
    seen = set()
    for _ in range(100):
        seen.add(order(policy))
        policy.forget(ExpertId(0, 0))
        ask(policy, 0, 0)
    assert len(seen) == 6


def test_belady_offers_those_never_wanted_again_and_then_the_one_wanted_last():
    policy = Belady([(0, [0, 1, 2]), (1, [0]), (0, [1]), (1, [0]), (0, [0])])
    ask(policy, 0, 0, 1, 2)
    assert order(policy) == "0.2 0.0 0.1"
    ask(policy, 1, 0)
    assert order(policy) == "0.2 0.0 1.0 0.1"
    ask(policy, 0, 1)
    assert order(policy) == "0.1 0.2 0.0 1.0"


@pytest.mark.parametrize("make", [LRU, LFU, LFRU, SLRU, Sieve, LeastStale, Random])
def test_experts_loaded_ahead_of_demand_leave_in_the_order_in_which_they_came(make):
    policy = make()
    ask(policy, 0, 0, 1)
    for expert in (5, 3, 4):
        policy.admit(ExpertId(1, expert))
    assert order(policy).startswith("1.5 1.3 1.4 0.")
