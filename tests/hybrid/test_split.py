"""The split of absent experts between link and host is the fastest there is, and moves what is worth keeping."""

from itertools import combinations
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.hybrid.split import MOST_PAIRS, MissRates, pays
from transformers_moe_offload.hybrid.split import split as computed_of

seconds = st.integers(0, 20).map(float)
"""Whole numbers, of which sums are exact."""
all_rates = st.builds(MissRates, fetch_s=seconds, expert_s=seconds, row_s=seconds, trip_s=seconds)
absent = st.lists(st.integers(1, 8), max_size=7).map(lambda counts: dict(enumerate(counts)))


def split(tokens, *arguments):
    """What the host computes, and what is fetched: all others, in the order in which they were asked for."""
    computed, seconds = computed_of(tokens, *arguments)
    fetched = tuple(expert for expert in tokens if expert not in computed)
    return SimpleNamespace(fetched=fetched, computed=tuple(computed), seconds=seconds)


def seconds_of(fetched, computed, tokens, rates, loads_under_way=0):
    """What a split takes, spelled out."""
    host = sum(rates.expert_s + rates.row_s * (tokens[expert] - 1) for expert in computed)
    return max((loads_under_way + len(fetched)) * rates.fetch_s, rates.trip_s + host if computed else 0.0)


@given(absent, all_rates, st.integers(0, 4), st.data())
def test_no_other_split_is_faster(tokens, rates, loads_under_way, data):
    at_hand = data.draw(st.sets(st.sampled_from(sorted(tokens)))) if tokens else set()
    found = split(tokens, rates, at_hand, loads_under_way)
    assert set(found.computed) <= at_hand
    assert sorted(found.fetched + found.computed) == sorted(tokens)
    assert found.seconds == seconds_of(found.fetched, found.computed, tokens, rates, loads_under_way)
    for number in range(len(at_hand) + 1):
        for computed in combinations(sorted(at_hand), number):
            fetched = [expert for expert in tokens if expert not in computed]
            assert found.seconds <= seconds_of(fetched, computed, tokens, rates, loads_under_way)


@given(absent, all_rates)
def test_of_equally_fast_splits_the_one_that_moves_most_is_taken(tokens, rates):
    found = split(tokens, rates, tokens)
    for number in range(len(found.computed)):
        for computed in combinations(tokens, number):
            fetched = [expert for expert in tokens if expert not in computed]
            assert seconds_of(fetched, computed, tokens, rates) > found.seconds


@given(absent, all_rates)
def test_a_busier_link_never_leaves_less_to_the_host(tokens, rates):
    numbers = [len(split(tokens, rates, tokens, loads).computed) for loads in range(5)]
    assert numbers == sorted(numbers)


@given(absent, all_rates)
def test_the_order_of_asking_is_kept_on_both_sides(tokens, rates):
    found = split(tokens, rates, tokens)
    order = list(tokens)
    for side in (found.fetched, found.computed):
        assert list(side) == sorted(side, key=order.index)


def test_the_host_takes_a_share_in_proportion_to_its_speed():
    """Eight misses; the link moves one while the host computes three."""
    rates = MissRates(fetch_s=3.0, expert_s=1.0, row_s=0.0, trip_s=0.0)
    found = split(dict.fromkeys(range(8), 1), rates, range(8))
    assert (len(found.fetched), len(found.computed), found.seconds) == (2, 6, 6.0)


def test_what_is_moved_is_what_many_tokens_want_and_then_what_was_asked_for_last():
    rates = MissRates(fetch_s=2.0, expert_s=1.0, row_s=0.5, trip_s=0.0)
    assert split({4: 1, 2: 3, 7: 1}, rates, (2, 4, 7)).fetched == (2,)
    assert split({4: 1, 2: 1, 7: 1}, rates, (2, 4, 7)).fetched == (7,)


def test_experts_that_are_still_on_disk_are_moved():
    rates = MissRates(fetch_s=100.0, expert_s=1.0, row_s=0.0, trip_s=0.0)
    found = split({0: 1, 1: 1, 2: 1}, rates, {1})
    assert (found.fetched, found.computed) == ((0, 2), (1,))


def test_a_host_that_is_slower_than_the_link_computes_nothing_of_little():
    rates = MissRates(fetch_s=1.0, expert_s=3.0, row_s=0.0, trip_s=0.5)
    assert split({0: 1, 1: 1}, rates, (0, 1)).computed == ()


def test_tokens_do_not_travel_for_what_the_trip_takes_longer_than():
    rates = MissRates(fetch_s=1.0, expert_s=0.1, row_s=0.0, trip_s=5.0)
    assert split({0: 1, 1: 1}, rates, (0, 1)).computed == ()


def test_a_prompt_is_left_to_the_accelerator():
    rates = MissRates(fetch_s=10.0, expert_s=0.1, row_s=0.0, trip_s=0.0)
    assert split({0: MOST_PAIRS}, rates, (0,)).computed == (0,)
    assert split({0: MOST_PAIRS, 1: 1}, rates, (0, 1)).computed == ()


def test_nobody_absent_takes_no_time():
    rates = MissRates(fetch_s=1.0, expert_s=1.0, row_s=1.0, trip_s=1.0)
    found = split({}, rates, ())
    assert (found.fetched, found.computed, found.seconds) == ((), (), 0.0)


def test_the_host_is_used_unasked_only_where_it_saves_a_good_part():
    fast, slow = (MissRates(fetch_s=1.0, expert_s=s, row_s=0.0, trip_s=0.0) for s in (1.0, 9.0))
    assert pays(fast, 8)
    assert not pays(slow, 8)
    assert not pays(fast, 0)
