from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moe_offload.prefetch.controller import BLOCK_STEPS, LONGEST_HOLD, Controller
from transformers_moe_offload.prefetch.controller import TRIAL as BLOCKS

TRIAL = BLOCK_STEPS * len(BLOCKS)


def run(controller, steps, seconds_on, seconds_off):
    """Let steps take their time; returns how many of them were done with prefetching."""
    with_prefetching = 0
    for _ in range(steps):
        with_prefetching += controller.is_on
        controller.took(seconds_on if controller.is_on else seconds_off)
    return with_prefetching


def test_half_of_a_trial_is_done_with_prefetching():
    assert run(Controller(), TRIAL, 1.0, 1.0) == TRIAL / 2


def test_it_stays_on_where_steps_are_faster_with_it():
    controller = Controller()
    run(controller, TRIAL, 0.9, 1.0)
    assert run(controller, 50, 0.9, 1.0) == 50


def test_it_stays_off_where_steps_are_slower_with_it_or_no_faster():
    for seconds_on in (1.1, 1.0, 0.995):
        controller = Controller()
        run(controller, TRIAL, seconds_on, 1.0)
        assert run(controller, 50, seconds_on, 1.0) == 0


def test_it_is_tried_again_when_things_change():
    controller = Controller()
    run(controller, TRIAL, 1.1, 1.0)
    run(controller, 200, 0.9, 1.0)
    assert controller.is_on


def test_one_slow_step_decides_nothing():
    controller = Controller()
    for step in range(TRIAL):
        controller.took(100.0 if step == 3 else 0.9 if controller.is_on else 1.0)
    assert controller.is_on


def test_a_cache_that_fills_up_meanwhile_favours_neither_way():
    for gain, expected in ((0.03, True), (0.0, False)):
        controller = Controller()
        for step in range(TRIAL):
            controller.took((2.0 - step / TRIAL) * (1 - gain * controller.is_on))
        assert controller.is_on == expected


def test_the_first_step_after_a_change_is_not_counted():
    """It still feels the block before: loads under way, a slot that was taken."""
    controller = Controller()
    for step in range(TRIAL):
        fast, slow = (0.9, 1.0) if controller.is_on else (1.0, 0.9)
        controller.took(slow if step % BLOCK_STEPS == 0 else fast)
    assert controller.is_on


def test_trying_costs_little_where_it_does_not_pay():
    """Steps that are a tenth slower with prefetching: over a long generation less than 3 % in all, by far."""
    controller = Controller()
    steps = 2000
    with_prefetching = run(controller, steps, 1.1, 1.0)
    assert 0.1 * with_prefetching / steps < 0.01


@settings(max_examples=30)
@given(times=st.lists(st.floats(1e-6, 10), min_size=200, max_size=400))
def test_whatever_the_steps_take_there_is_always_another_trial(times):
    controller = Controller()
    for seconds in times * (2 * LONGEST_HOLD // len(times) + 1):
        controller.took(seconds)
    trial_ahead = [controller.is_on]
    for _ in range(LONGEST_HOLD + TRIAL):
        controller.took(1.0)
        trial_ahead.append(controller.is_on)
    assert any(trial_ahead)
    assert not all(trial_ahead)
