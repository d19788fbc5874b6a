"""What a layer takes by its costs, and costs that are found from what layers took."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.tuning.costs import Costs, Landings, Timing, fitted

MILLISECONDS = st.floats(0.01, 5).map(lambda ms: ms / 1e3)


def test_without_loads_a_layer_takes_its_arithmetic():
    assert Costs(step_s=9, expert_s=2, visit_s=5, start_s=7, first_s=8, next_s=9).layer_s(3, 0) == 6


def test_loads_land_while_residents_are_computed():
    costs = Costs(step_s=0, expert_s=10, visit_s=1, start_s=2, first_s=20, next_s=5)
    # Starts at 3 and 5, landings at 23 and 28; residents are computed from 5 to 25, the others until 35 and 45.
    assert costs.layer_s(4, 2) == 45
    # Starts at 3, 5, 7, 9; landings at 23, 28, 33, 38. From 23 on there is always something to compute.
    assert costs.layer_s(4, 4) == 23 + 4 * 10


def test_a_slow_way_into_the_slots_is_what_is_waited_for():
    costs = Costs(step_s=0, expert_s=1, first_s=20, next_s=10)
    assert costs.layer_s(3, 3) == 20 + 10 + 10 + 1
    assert costs.layer_s(2, 2) == 20 + 10 + 1


def test_waking_up_is_paid_for_by_those_that_wait():
    costs = Costs(step_s=0, expert_s=1, first_s=20, next_s=10, wake_s=3)
    assert costs.layer_s(1, 1) == 20 + 3 + 1
    assert costs.layer_s(2, 2) == 30 + 3 + 1
    assert Costs(step_s=0, expert_s=30, first_s=20, wake_s=3).layer_s(2, 1) == 60, "it has landed meanwhile"


@given(
    costs=st.builds(
        Costs,
        step_s=st.just(1.5),
        expert_s=MILLISECONDS,
        visit_s=MILLISECONDS,
        start_s=MILLISECONDS,
        first_s=MILLISECONDS,
        next_s=MILLISECONDS,
        wake_s=MILLISECONDS,
    ),
    wanted=st.integers(2, 8),
)
def test_costs_are_found_that_give_the_times_that_were_measured(costs, wanted):
    timings = [_timing(costs, wanted, loads) for loads in range(wanted + 1) for _ in range(3)]
    landings = [Landings(loads, costs.first_s + (loads - 1) * costs.next_s) for loads in (1, wanted)]
    found = fitted(costs.step_s, timings, landings * 3)
    total = sum(costs.layer_s(wanted, loads) for loads in range(1, wanted + 1))
    assert sum(found.layer_s(wanted, loads) for loads in range(1, wanted + 1)) == pytest.approx(total)
    assert found.first_s == pytest.approx(costs.first_s)
    assert found.next_s == pytest.approx(costs.next_s)
    assert found.expert_s == pytest.approx(costs.expert_s)
    assert found.visit_s == pytest.approx(costs.visit_s, rel=1e-3, abs=1e-6)
    assert found.start_s == pytest.approx(costs.start_s, rel=1e-3)


def _timing(costs, wanted, loads):
    own_s = wanted * costs.expert_s + (costs.visit_s + loads * costs.start_s if loads else 0)
    return Timing(wanted, loads, costs.layer_s(wanted, loads), own_s)


def test_noise_gives_no_negative_costs():
    timings = [Timing(2, 0, 4.0, 4.0), Timing(2, 1, 3.0, 3.0), Timing(2, 2, 2.5, 2.0)]
    found = fitted(1.0, timings, [Landings(1, 0.1), Landings(2, 0.05)])
    assert found.expert_s == 2
    assert min(found.visit_s, found.start_s, found.first_s, found.next_s, found.wake_s) >= 0


def test_without_a_load_there_is_nothing_to_say_about_loads():
    assert fitted(1.0, [Timing(2, 0, 4.0, 4.0)], []) == Costs(step_s=1.0, expert_s=2.0)
