import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from transformers_moe_offload.cache.capacity import (
    PoolNeed,
    layer_floor,
    share_out,
    share_out_by_device,
    smallest_budget,
)
from transformers_moe_offload.errors import CapacityError


@st.composite
def pools(draw):
    num_layers = draw(st.integers(1, 8))
    num_experts = num_layers * draw(st.integers(1, 64))
    num_hot = draw(st.integers(0, num_experts - 1))
    others = ((draw(st.integers(1, 10**9)), num_hot),) if num_hot else ()
    return PoolNeed(num_layers, num_experts, draw(st.integers(1, 10**9)), others)


needs_of_pools = st.lists(pools(), min_size=1, max_size=4)


@given(needs_of_pools, st.integers(1, 10**12))
def test_slots_never_take_more_than_the_budget_and_every_pool_gets_one(needs, budget):
    assume(budget >= smallest_budget(needs))
    slots = share_out(budget, needs)
    assert sum(need.bytes_of(n) for n, need in zip(slots, needs, strict=True)) <= budget
    assert all(1 <= n <= need.num_experts for n, need in zip(slots, needs, strict=True))


@given(needs_of_pools)
def test_the_smallest_budget_works_and_one_byte_less_does_not(needs):
    smallest = smallest_budget(needs)
    assert share_out(smallest, needs) == [1] * len(needs)
    with pytest.raises(CapacityError) as caught:
        share_out(smallest - 1, needs)
    assert caught.value.smallest_budget == smallest
    assert f"{smallest - 1:,} bytes" in str(caught.value)
    assert f"cache_budget to {smallest:,} bytes or more" in str(caught.value)


@given(needs_of_pools, st.integers(0, 10**9))
def test_a_budget_for_everything_gives_every_expert_a_slot(needs, more):
    everything = sum(need.all_bytes for need in needs)
    assert share_out(everything + more, needs) == [need.num_experts for need in needs]


@given(needs_of_pools, st.integers(0, 10**9), st.integers(0, 10**9))
def test_more_budget_never_means_fewer_slots(needs, spare, more):
    smallest = smallest_budget(needs)
    less_slots, more_slots = share_out(smallest + spare, needs), share_out(smallest + spare + more, needs)
    assert all(a <= b for a, b in zip(less_slots, more_slots, strict=True))


@given(pools(), st.integers(0, 10**12))
def test_a_pool_alone_gets_all_the_slots_that_fit(need, budget):
    assume(budget >= need.largest_bytes)
    (num_slots,) = share_out(budget, [need])
    assert need.bytes_of(num_slots) <= budget
    assert num_slots == need.num_experts or need.bytes_of(num_slots + 1) > budget


@given(pools(), st.randoms(use_true_random=False))
def test_whoever_is_in_the_slots_they_take_no_more_than_was_planned(need, random):
    sizes = [size for size, count in need.others for _ in range(count)]
    sizes += [need.slot_bytes] * (need.num_experts - len(sizes))
    num_slots = random.randint(1, need.num_experts)
    assert sum(random.sample(sizes, num_slots)) <= need.bytes_of(num_slots)
    assert sum(sizes) == need.all_bytes


def test_equal_pools_get_equal_shares():
    assert share_out(1000, [PoolNeed(2, 16, 50), PoolNeed(2, 16, 50)]) == [10, 10]


def test_the_budget_is_shared_by_bytes_and_not_by_experts():
    small, large = PoolNeed(1, 101, 10), PoolNeed(1, 101, 30)
    assert share_out(smallest_budget([small, large]) + 2000, [small, large]) == [51, 51]


@given(st.integers(1, 500), st.integers(1, 100))
def test_the_floors_of_all_layers_together_fit_into_the_slots(num_slots, num_layers):
    """So a layer that wants a slot always finds one: free, its own, or another layer's above its floor."""
    floor = layer_floor(num_slots, num_layers)
    assert 0 <= floor * num_layers <= num_slots


def test_what_is_free_on_one_device_is_no_budget_for_another():
    """Two devices with eight experts each, of which one has room for all and the other for three."""
    equal = PoolNeed(2, 8, 100)
    budget_bytes, slots = share_out_by_device({"a": 5000, "b": 350}, ["a", "b"], [equal, equal])
    assert (budget_bytes, slots) == (800 + 350, [8, 3])


def test_pools_of_one_device_share_what_is_free_there():
    small, large = PoolNeed(1, 10, 10), PoolNeed(1, 10, 30)
    _, slots = share_out_by_device({"a": 200, "b": 50}, ["a", "b", "a"], [small, small, large])
    assert slots == [5, 5, 5]


def test_a_device_without_room_for_one_expert_is_an_error_although_another_has_plenty():
    with pytest.raises(CapacityError):
        share_out_by_device({"a": 99, "b": 10**9}, ["a", "b"], [PoolNeed(1, 4, 100), PoolNeed(1, 4, 100)])
