"""A replay counts what a run would count, and no policy beats the oracle."""

from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import Belady, policy_names
from transformers_moe_offload.tracing import TraceRecorder, replay
from transformers_moe_offload.tracing.replay import NoSlots

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"

each_policy = pytest.mark.parametrize("policy", policy_names())


def trace_of(visits, num_layers, num_experts):
    recorder = TraceRecorder([f"layers.{i}" for i in range(num_layers)], [num_experts] * num_layers)
    for layer, wanted in visits:
        recorder.record(layer, wanted)
    return recorder.trace


def traces(num_layers, num_experts, max_size):
    layers = st.integers(0, num_layers - 1)
    wanted = st.lists(st.integers(0, num_experts - 1), max_size=num_experts, unique=True)
    visits = st.lists(st.tuples(layers, wanted), max_size=max_size)
    return visits.map(lambda visits: trace_of(visits, num_layers, num_experts))


def counts(replayed):
    return [(stats.hits, stats.late_hits, stats.misses) for stats in replayed.per_layer.values()]


def test_a_trace_worked_out_by_hand_has_these_hits():
    trace = trace_of([(0, [0, 1]), (0, [1, 2]), (0, [0, 3]), (1, [3]), (0, [1, 3])], 2, 4)
    assert counts(replay(trace, "lru", 3)) == [(3, 0, 5), (0, 0, 1)]
    assert counts(replay(trace, "belady", 3)) == [(4, 0, 4), (0, 0, 1)]
    assert replay(trace, "lru", 3).hit_rate == 3 / 9


@each_policy
def test_with_a_slot_for_everybody_only_the_first_time_is_a_miss(policy):
    trace = trace_of([(layer, [0, 2, 3]) for layer in (0, 1, 0, 1)], 2, 4)
    assert counts(replay(trace, policy, 8)) == counts(replay(trace, "belady", 8)) == [(3, 0, 3)] * 2


@each_policy
def test_an_empty_trace_has_a_hit_rate_of_zero(policy):
    assert replay(trace_of([], 1, 4), policy, 2).hit_rate == 0


def test_a_replay_without_slots_is_refused():
    with pytest.raises(ConfigError, match="a replay needs 1 slot or more, not 0"):
        replay(trace_of([], 1, 4), "lru", 0)


def test_a_replay_of_a_policy_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="policy='lur' is not a known policy"):
        replay(trace_of([], 1, 4), "lur", 1)


@each_policy
@given(trace=traces(3, 5, 25), num_slots=st.integers(1, 15))
@settings(max_examples=60, deadline=None)
def test_no_policy_beats_the_oracle_on_any_trace(policy, trace, num_slots):
    assert replay(trace, policy, num_slots).hits <= replay(trace, "belady", num_slots).hits


@given(trace=traces(3, 5, 25), num_slots=st.integers(1, 14))
@settings(max_examples=60, deadline=None)
def test_the_oracle_never_loses_by_a_slot_more(trace, num_slots):
    assert replay(trace, "belady", num_slots).hits <= replay(trace, "belady", num_slots + 1).hits


def most_hits(visits, num_slots):
    """Try everything: any residents may stay after a visit, if one of its own is among them."""

    @cache
    def most_hits_from(turn, residents):
        if turn == len(visits):
            return 0
        wanted = {ExpertId(visits[turn].layer, expert) for expert in visits[turn].wanted}
        present = residents | wanted
        stays = combinations(sorted(present), min(num_slots, len(present)))
        return len(residents & wanted) + max(
            most_hits_from(turn + 1, frozenset(stay)) for stay in stays if not wanted or wanted & set(stay)
        )

    return most_hits_from(0, frozenset())


@given(trace=traces(2, 3, 7), num_slots=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_trying_everything_finds_no_more_hits_than_the_oracle_and_no_fewer(trace, num_slots):
    assert replay(trace, "belady", num_slots).hits == most_hits(trace.visits, num_slots)


@given(
    wanted=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3, unique=True), max_size=20),
    num_slots=st.integers(3, 6),
)
@settings(max_examples=60, deadline=None)
def test_the_oracles_order_serves_best_in_the_cache_of_a_model_as_well(wanted, num_slots):
    """One layer whose experts fit, so that they are all resident at the end of a visit: the best among such caches."""
    trace = trace_of([(0, experts) for experts in wanted], 1, 6)
    cache_of_oracle = ExpertCache(NoSlots(), num_slots, {0: 6}, Belady(trace.requests()))
    for layer, experts in trace.requests():
        with cache_of_oracle.turn, cache_of_oracle.visit(layer, experts) as visit:
            list(visit)
    hits = cache_of_oracle.stats[0].hits
    assert max([replay(trace, policy, num_slots).hits for policy in policy_names()]) <= hits
    assert hits <= replay(trace, "belady", num_slots).hits


# A model that runs.


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    return [tokenizer(text, return_tensors="pt") for text in ("import os\n\ndef ", "Once upon a time, ")]


def generate(policy, cache_budget, prompts):
    """Per layer: hits, late hits and misses of a generation, and its trace."""
    model = AutoModelForCausalLM.from_pretrained(
        TINY_MOE, moe_offload=OffloadConfig(cache_budget=cache_budget, policy=policy, prefetch=None)
    )
    with model.moe_offload.trace() as trace:
        for prompt in prompts:
            model.generate(**prompt, max_new_tokens=8, do_sample=False)
    num_slots = model.moe_offload.plan.num_slots
    live = model.moe_offload.stats().per_layer
    assert list(live) == list(trace.layer_names)
    return [(stats.hits, stats.late_hits, stats.misses) for stats in live.values()], trace, num_slots


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@each_policy
@pytest.mark.parametrize("cache_budget", ["8%", "45%"])
def test_a_replay_has_exactly_the_hits_of_the_generation_it_was_recorded_from(policy, cache_budget, prompts):
    live, trace, num_slots = generate(policy, cache_budget, prompts)
    assert sum(hits for hits, _, _ in live) > 0 or cache_budget == "8%"
    assert counts(replay(trace, policy, num_slots)) == live


def test_what_is_recorded_does_not_depend_on_the_cache_it_was_recorded_with(prompts):
    _, small, _ = generate("lru", "10%", prompts)
    _, large, _ = generate("lfu", "100%", prompts)
    assert small.visits == large.visits
    assert small.step_tokens == large.step_tokens
    assert all(first.step <= second.step for first, second in pairwise(small.visits))
