"""The controller against simulated steps: what prefetching saves is kept, and what it costs is soon over."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moe_offload.prefetch.controller import (
    BLOCK_STEPS,
    LONGEST_HOLD,
    MOST_ROUNDS,
    ROUND,
    SHORTEST_HOLD,
    WARM_UP,
    WATCHED_STEPS,
    Controller,
)

SHORTEST_TRIAL = WARM_UP + 2 * BLOCK_STEPS * len(ROUND)
LONGEST_TRIAL = WARM_UP + MOST_ROUNDS * BLOCK_STEPS * len(ROUND)


def run(controller, steps, seconds_on, seconds_off):
    """Let steps take their time; returns how many of them were done with prefetching."""
    with_prefetching = 0
    for _ in range(steps):
        with_prefetching += controller.is_on
        controller.took(seconds_on if controller.is_on else seconds_off)
    return with_prefetching


def time_saved(gain, noise, steps, seed, controller=None):
    """Part of the time without prefetching that a controller saves where it saves `gain` of each step."""
    controller, without, saved = controller or Controller(), 0.0, 0.0
    for slowness in noise(random.Random(seed), steps):
        without += slowness
        saved += slowness * gain * controller.is_on
        controller.took(slowness * (1 - gain * controller.is_on))
    return saved / without


def steady(draw, steps):
    """Steps that vary by a tenth."""
    return [math.exp(0.1 * draw.gauss(0, 1)) for _ in range(steps)]


def with_outliers(draw, steps):
    """One step in twenty takes up to four times as long."""
    return [time * (draw.uniform(1.5, 4) if draw.random() < 0.05 else 1) for time in steady(draw, steps)]


def with_hold_ups(draw, steps):
    """Now and then something else has the machine for up to thirty steps."""
    times, left = [], 0
    for time in steady(draw, steps):
        left = draw.randint(3, 30) if not left and draw.random() < 0.02 else max(0, left - 1)
        times.append(time * (1.5 if left else 1))
    return times


def filling_up(draw, steps):
    """Begins twice as slow, with an empty cache."""
    return [time * (1 + math.exp(-step / 30)) for step, time in enumerate(steady(draw, steps))]


each_noise = pytest.mark.parametrize("noise", [steady, with_outliers, with_hold_ups, filling_up])


@each_noise
@pytest.mark.parametrize("loss", [0.03, 0.1, 0.3, 1.0])
def test_over_two_thousand_steps_nothing_is_three_percent_slower_than_without_prefetching(loss, noise):
    assert min(time_saved(-loss, noise, 2000, seed) for seed in range(12)) > -0.03


@each_noise
def test_nine_tenths_of_a_fifth_are_saved_within_three_hundred_steps(noise):
    saved = sorted(time_saved(0.2, noise, 300, seed) / 0.2 for seed in range(40))
    assert saved[len(saved) // 2] > 0.9
    assert saved[0] > 0.6


@each_noise
def test_of_a_tenth_nearly_all_is_saved_in_the_long_run(noise):
    saved = sorted(time_saved(0.1, noise, 3000, seed) / 0.1 for seed in range(12))
    assert saved[len(saved) // 2] > 0.85


@given(
    gain=st.floats(-1.0, 0.5),
    noise=st.sampled_from([steady, with_outliers, with_hold_ups, filling_up]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None)
def test_whatever_prefetching_does_it_costs_little(gain, noise, seed):
    assert time_saved(gain, noise, 2000, seed) > -0.04


def test_it_begins_with_prefetching():
    assert run(Controller(), WARM_UP, 1.0, 1.0) == WARM_UP


def test_a_clear_trial_is_short():
    for seconds_on, expected in ((0.8, SHORTEST_HOLD), (1.25, 0)):
        controller = Controller()
        run(controller, SHORTEST_TRIAL, seconds_on, 1.0)
        assert run(controller, SHORTEST_HOLD, seconds_on, 1.0) == expected


def test_it_stays_off_where_steps_are_no_faster_with_it():
    for seconds_on in (1.0, 0.995):
        controller = Controller()
        run(controller, SHORTEST_TRIAL, seconds_on, 1.0)
        assert run(controller, SHORTEST_HOLD, seconds_on, 1.0) == 0


def test_it_is_tried_again_when_things_change():
    controller = Controller()
    run(controller, SHORTEST_TRIAL, 1.1, 1.0)
    run(controller, 2 * SHORTEST_HOLD, 0.9, 1.0)
    assert run(controller, 50, 0.9, 1.0) == 50


@each_noise
@pytest.mark.parametrize("gain", [0.2, 0.5])
@pytest.mark.parametrize("loss", [0.3, 1.0])
def test_what_has_paid_is_left_off_soon_after_it_costs(gain, loss, noise):
    """As where another text comes: it lasts until it is looked at, and through one trial."""
    steps, lasts, saved = 2000, SHORTEST_HOLD + WATCHED_STEPS + SHORTEST_TRIAL, []
    for seed in range(12):
        controller = Controller()
        time_saved(gain, noise, 500, seed, controller)
        saved.append(time_saved(-loss, noise, steps, seed, controller))
    assert sorted(saved)[len(saved) // 2] > -loss * lasts / steps


def test_what_pays_is_kept_while_all_steps_grow_slower():
    """As they do when a text grows; what it takes to look again is little."""
    controller, saved, without = Controller(), 0.0, 0.0
    for step in range(6000):
        without += 1 + step / 2000
        saved += 0.2 * (1 + step / 2000) * controller.is_on
        controller.took((1 + step / 2000) * (1 - 0.2 * controller.is_on))
    assert saved / without > 0.2 * 0.9


def test_what_costs_much_is_seldom_tried():
    dear, cheap = Controller(), Controller()
    assert run(dear, 3000, 2.0, 1.0) < run(cheap, 3000, 1.02, 1.0)


def test_the_first_step_after_a_change_is_not_counted():
    """It still feels the block before: loads under way, a slot that was taken."""
    controller = Controller()
    for step in range(SHORTEST_TRIAL):
        fast, slow = (0.9, 1.0) if controller.is_on else (1.0, 0.9)
        is_first = step >= WARM_UP and (step - WARM_UP) % BLOCK_STEPS == 0
        controller.took(slow if is_first else fast)
    assert controller.is_on


def test_the_steps_in_which_the_predictor_learns_are_not_counted():
    controller = Controller()
    run(controller, WARM_UP, 50.0, 1.0)
    run(controller, SHORTEST_TRIAL - WARM_UP, 0.9, 1.0)
    assert controller.is_on


@settings(max_examples=20, deadline=None)
@given(times=st.lists(st.floats(0, 10), min_size=200, max_size=400))
def test_whatever_the_steps_take_there_is_always_another_trial(times):
    controller = Controller()
    for seconds in times * 5:
        controller.took(seconds)
    ahead = []
    for _ in range(LONGEST_HOLD + LONGEST_TRIAL):
        ahead.append(controller.is_on)
        controller.took(1.0)
    assert any(ahead)
    assert not all(ahead)
