"""A comparison tells a difference from chance, and is not led astray by what happens to the machine meanwhile."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.prefetch.controller import Comparison

seconds = st.floats(1e-4, 1e2)
blocks = st.lists(seconds, min_size=3, max_size=5)
pairs = st.lists(st.tuples(blocks, blocks), min_size=4, max_size=12)


def pairs_of(gain, noise, num_pairs, seed=0):
    """Blocks of four steps around a second, and around `gain` less."""
    draw = random.Random(seed)

    def block(typical):
        return [typical * math.exp(noise * draw.gauss(0, 1)) for _ in range(4)]

    return [(block(1.0), block(1.0 - gain)) for _ in range(num_pairs)]


@pytest.mark.parametrize("gain", [0.5, 0.1, 0.0, -0.1, -1.0])
def test_the_gain_is_the_part_of_the_time_that_is_saved(gain):
    assert Comparison.of(pairs_of(gain, 0.0, 4)).gain == pytest.approx(gain)


def test_less_than_four_pairs_make_nothing_clear():
    assert not Comparison.of(pairs_of(0.5, 0.0, 3)).is_clear(0.01)
    assert Comparison.of(pairs_of(0.5, 0.0, 4)).is_clear(0.01)


@pytest.mark.parametrize("gain", [0.2, -0.2])
def test_a_fifth_is_clear_within_a_few_pairs_of_steps_that_vary_by_a_tenth(gain):
    found = [Comparison.of(pairs_of(gain, 0.1, 8, seed)) for seed in range(100)]
    assert sum(one.is_clear(0.01) for one in found) >= 90
    assert all(one.gain * gain > 0 for one in found)


def test_ways_that_do_not_differ_are_seldom_told_apart():
    found = [Comparison.of(pairs_of(0.0, 0.1, 8, seed)) for seed in range(200)]
    assert sum(one.is_clear(0.0) for one in found) <= 4


@given(pairs, st.floats(1e-2, 1e2))
def test_a_machine_that_is_slower_all_the_time_changes_nothing(pairs, factor):
    slower = [tuple([factor * time for time in block] for block in pair) for pair in pairs]
    one, other = Comparison.of(pairs), Comparison.of(slower)
    assert (other.saved, other.error) == pytest.approx((one.saved, one.error), abs=1e-9)


@given(pairs, st.lists(st.floats(1e-1, 1e1), min_size=12, max_size=12))
def test_what_slows_both_blocks_of_a_pair_changes_nothing(pairs, factors):
    held_up = [
        tuple([factor * time for time in block] for block in pair) for pair, factor in zip(pairs, factors, strict=False)
    ]
    assert Comparison.of(held_up).saved == pytest.approx(Comparison.of(pairs).saved, abs=1e-9)


@given(pairs)
def test_the_ways_are_treated_alike(pairs):
    one, other = Comparison.of(pairs), Comparison.of([(second, first) for first, second in pairs])
    assert (other.saved, other.error) == pytest.approx((-one.saved, one.error), abs=1e-9)


def test_one_block_that_something_else_held_up_passes_for_no_difference():
    pairs = pairs_of(0.0, 0.02, 6)
    pairs[2] = (pairs[2][0], [3 * time for time in pairs[2][1]])
    found = Comparison.of(pairs)
    assert abs(found.gain) < 0.05
    assert not found.is_clear(0.0)


def test_one_slow_step_changes_a_block_hardly():
    pairs = pairs_of(0.2, 0.02, 6)
    pairs[2][1][0] = 100.0
    assert Comparison.of(pairs).gain == pytest.approx(0.2, abs=0.05)
