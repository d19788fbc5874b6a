"""A prediction is a replay of the cache of a model, with a clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.policies import policy_names
from transformers_moe_offload.tracing import TraceError, TraceRecorder, replay
from transformers_moe_offload.tuning.costs import Costs
from transformers_moe_offload.tuning.prediction import Pool, predict

COSTS = Costs(step_s=100, expert_s=10, visit_s=1, start_s=2, first_s=20, next_s=5)
LAYERS, EXPERTS = 3, 5

each_policy = pytest.mark.parametrize("policy", policy_names())


def trace_of(steps, num_layers=LAYERS, num_experts=EXPERTS):
    """A trace of steps, each the experts that every layer wants, of one token; or a pair of these and a number."""
    recorder = TraceRecorder([f"layers.{i}" for i in range(num_layers)], [num_experts] * num_layers)
    for step in steps:
        wanted, num_tokens = step if isinstance(step, tuple) else (step, 1)
        recorder.begin_forward(num_tokens)
        for layer, experts in enumerate(wanted):
            recorder.record(layer, experts)
        recorder.end_forward()
    return recorder.trace


def traces(most_wanted=EXPERTS):
    wanted = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=most_wanted, unique=True)
    return st.lists(st.lists(wanted, min_size=LAYERS, max_size=LAYERS), min_size=1, max_size=15).map(trace_of)


def predicted(trace, num_slots, policy="lru", costs=COSTS):
    layers = tuple(range(trace.num_layers))
    return predict([trace], [Pool(layers, num_slots)], policy, costs)


def test_a_small_trace_takes_what_is_worked_out_by_hand():
    trace = trace_of([[[0, 1]], [[1, 2]], [[1, 2]]], num_layers=1, num_experts=3)
    found = predicted(trace, 2)
    # Step 1: 100, then 1 for the visit; starts at 103 and 105, landings at 123 and 128, computed until 133 and 143.
    # Step 2: from 243; 1, start at 246, landing at 266; the resident is computed until 256, the other until 276.
    # Step 3: from 376, two residents: 396.
    assert (found.steps, found.seconds) == (3, 396)
    assert (found.asked, found.hits, found.misses) == (6, 3, 3)
    assert found.tokens_per_s == 3 / 396
    assert found.hit_rate == 0.5


@given(wanted=st.integers(1, EXPERTS), loads=st.integers(0, EXPERTS))
def test_one_layer_takes_what_its_costs_say(wanted, loads):
    loads = min(loads, wanted)
    residents = list(range(loads, wanted))
    first = ([residents], 2) if residents else ([[]], 2)
    trace = trace_of([first, [list(range(wanted))]], num_layers=1)
    assert predicted(trace, EXPERTS).seconds == pytest.approx(COSTS.step_s + COSTS.layer_s(wanted, loads))


@each_policy
@given(trace=traces(), num_slots=st.integers(1, LAYERS * EXPERTS))
def test_hits_are_those_of_a_replay(policy, trace, num_slots):
    found, replayed = predicted(trace, num_slots, policy), replay(trace, policy, num_slots)
    assert found.hits == replayed.hits
    assert found.misses == sum(stats.misses for stats in replayed.per_layer.values())
    assert found.asked == trace.num_asked


@given(trace=traces(most_wanted=2), per_layer=st.integers(2, EXPERTS - 1))
def test_a_slot_more_for_each_layer_never_misses_more_under_lru(trace, per_layer):
    """LRU is a stack algorithm (Mattson 1970): what is resident with fewer slots is resident with more. That holds by
    layer, as long as a layer's experts have slots and slots divide evenly."""
    fewer, more = predicted(trace, LAYERS * per_layer), predicted(trace, LAYERS * (per_layer + 1))
    assert more.misses <= fewer.misses


@given(trace=traces())
def test_with_a_slot_for_each_expert_only_the_first_time_is_a_miss(trace):
    found = predicted(trace, LAYERS * EXPERTS)
    assert found.misses == len({(visit.layer, expert) for visit in trace.visits for expert in visit.wanted})


@given(trace=traces(), num_slots=st.integers(1, LAYERS * EXPERTS))
def test_time_is_at_least_that_of_the_arithmetic_and_equals_it_if_loads_take_none(trace, num_slots):
    arithmetic_s = len(trace.step_tokens) * COSTS.step_s + trace.num_asked * COSTS.expert_s
    assert predicted(trace, num_slots).seconds >= arithmetic_s
    assert predicted(trace, num_slots, costs=Costs(step_s=100, expert_s=10)).seconds == pytest.approx(arithmetic_s)


def test_prompts_fill_the_cache_and_are_not_counted():
    trace = trace_of([([[0, 1]], 7), [[0, 1]]], num_layers=1)
    found = predicted(trace, 2)
    assert (found.steps, found.seconds, found.asked, found.hits) == (1, 120, 2, 2)


def test_each_text_begins_with_an_empty_cache():
    trace = trace_of([[[0, 1]]], num_layers=1)
    once = predict([trace], [Pool((0,), 2)], "lru", COSTS)
    twice = predict([trace, trace], [Pool((0,), 2)], "lru", COSTS)
    assert (twice.steps, twice.misses) == (2, 2 * once.misses)
    assert twice.seconds == pytest.approx(2 * once.seconds)


def test_layers_have_the_slots_of_their_pool():
    trace = trace_of([[[0, 1], [0, 1]], [[0, 1], [0, 1]]], num_layers=2)
    found = predict([trace], [Pool((0,), 1), Pool((1,), 2)], "lru", COSTS)
    assert found.hits == 2 + 1, "both of the second layer's, and the one that the first layer has a slot for"


def test_a_trace_without_a_step_of_one_token_is_refused():
    with pytest.raises(
        TraceError, match="has no step of one token, and how fast tokens are decoded is what is predict"
    ):
        predicted(trace_of([([[0]], 4)], num_layers=1), 2)
