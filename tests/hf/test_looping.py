"""A model that runs some of its sparse layers several times in one forward: everything counts forwards as it should.

`inkling2_loop` is such a model. Of the zoo's, the third and the fourth of six sparse layers run three times.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from transformers_moe_offload import OffloadConfig, PrefetchConfig, cache_stats, routing, training
from transformers_moe_offload.routing.sites import find_sites
from transformers_moe_offload.routing.switching import observe, stop_observing
from transformers_moe_offload.tracing import replay
from zoo.build import build, inputs, load, save, zoo_names

NAME = "inkling2_loop"
ROUTE = [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]
TURNS = Counter(ROUTE)
PROMPT, NEW_TOKENS = 7, 5

pytestmark = pytest.mark.skipif(NAME not in zoo_names(), reason="this version of Transformers has no model with loops")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp(NAME)
    save(build(NAME), folder, "per-expert")
    return folder


@pytest.fixture(scope="module")
def plain():
    """Built, not loaded: its weights lie at addresses of their own, as products to the bit demand. Do not change it."""
    return build(NAME)


@pytest.fixture(scope="module")
def token_ids(plain):
    return inputs(NAME, plain, batch=2, length=PROMPT)["input_ids"]


@pytest.fixture(scope="module")
def expected(plain, token_ids):
    return generate(plain, token_ids)


def generate(model, token_ids):
    """Tokens and logits of a greedy generation."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    found = model.generate(
        token_ids,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences, torch.stack(found.logits)


def offloaded(plain, folder, budget="40%", **options):
    config = OffloadConfig(**{"cache_budget": budget, "arithmetic": "exact", "mmap": False} | options)
    return load(plain, folder, moe_offload=config)


@pytest.mark.parametrize("predictor", [None, "next_router", "transition", "last_token"])
def test_it_generates_what_the_plain_model_does_whatever_is_loaded_ahead(plain, folder, token_ids, expected, predictor):
    prefetch = None if predictor is None else PrefetchConfig(predictor=predictor, adaptive=False, lookahead=3)
    tokens, logits = generate(offloaded(plain, folder, prefetch=prefetch), token_ids)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "slru", "sieve", "least_stale"])
def test_a_trace_has_a_step_for_each_forward_and_replays_to_the_counts_of_the_run(plain, folder, token_ids, policy):
    model = offloaded(plain, folder, policy=policy)
    with model.moe_offload.trace() as trace:
        generate(model, token_ids)
    assert len(trace.step_tokens) == NEW_TOKENS
    for step in range(NEW_TOKENS):
        assert [visit.layer for visit in trace.visits if visit.step == step] == ROUTE
    stats = list(cache_stats(model).per_layer.values())
    played = replay(trace, policy, model.moe_offload.plan.pools[0].num_slots)
    assert [played.per_layer[layer].hits for layer in range(6)] == [layer.hits for layer in stats]
    asked = [sum(len(visit.wanted) for visit in trace.visits if visit.layer == layer) for layer in range(6)]
    assert [layer.asked for layer in stats] == asked
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_forward_that_is_broken_off_ends_its_step(plain, folder, token_ids):
    model = offloaded(plain, folder)
    last = model.get_submodule(model.moe_offload.layers[3].name)
    with model.moe_offload.trace() as trace, torch.no_grad():
        hook = last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(token_ids)
        hook.remove()
        model(token_ids)
    assert [visit.layer for visit in trace.visits if visit.step == 0] == [0, 1, 2]
    assert [visit.layer for visit in trace.visits if visit.step == 1] == ROUTE


def test_a_recording_tells_the_turns_of_a_token_apart(plain, token_ids):
    decisions = {}

    def note(router, decision):
        decisions.setdefault(router, []).append(decision)

    observe(plain, find_sites(plain), note)
    with routing.record_routing(plain, scores="float32") as recorder, torch.no_grad():
        plain(token_ids)
    stop_observing(plain, note)
    assert recorder.trace.num_tokens == token_ids.numel()
    for router, turns in TURNS.items():
        (rows,) = recorder.trace.rows(router)
        assert len(decisions[router]) == turns
        for turn, decision in enumerate(decisions[router]):
            of_turn = rows.turn == turn
            assert np.array_equal(rows.experts[of_turn], decision.experts)
            assert np.array_equal(rows.scores[of_turn], decision.scores)
            assert np.array_equal(rows.token_ids[of_turn], token_ids.flatten())
            assert rows.sequence[of_turn].tolist() == [0] * PROMPT + [1] * PROMPT
            assert rows.position[of_turn].tolist() == [*range(PROMPT)] * 2
        assert set(rows.turn.tolist()) == set(range(turns))


def test_statistics_compare_each_turn_with_the_same_turn_of_the_next_token(plain, token_ids):
    with routing.record_routing(plain) as recorder:
        generate(plain, token_ids)
    trace = recorder.trace
    for router, turns in TURNS.items():
        statistics = trace.statistics(router)
        counts = np.zeros_like(statistics.next_token)
        rows = list(trace.rows(router))
        experts, sequence, position, turn = (
            np.concatenate([getattr(one, name) for one in rows]) for name in ("experts", "sequence", "position", "turn")
        )
        place = {key: number for number, key in enumerate(zip(sequence, position, turn, strict=True))}
        assert len(place) == 2 * (PROMPT + NEW_TOKENS - 1) * turns, "rows that cannot be told apart"
        for (text, token, at_turn), number in place.items():
            after = place.get((text, token + 1, at_turn))
            if after is not None:
                counts[np.ix_(experts[number], experts[after])] += 1
        assert np.array_equal(statistics.next_token, counts)


def test_statistics_follow_a_token_to_the_router_that_it_comes_to_next(plain, token_ids):
    with routing.record_routing(plain) as recorder, torch.no_grad():
        plain(token_ids)
    trace = recorder.trace
    rows = {router: next(iter(trace.rows(router))) for router in range(6)}
    followed = {1: [(0, 0)], 2: [(0, 0), (1, 1), (2, 2)], 3: [(2, 0)]}  # turns of a router and of the one after it
    for router, turns in followed.items():
        counts = np.zeros_like(trace.statistics(router).next_layer)
        for turn, next_turn in turns:
            one = rows[router].experts[rows[router].turn == turn]
            other = rows[router + 1].experts[rows[router + 1].turn == next_turn]
            for here, there in zip(one, other, strict=True):
                counts[np.ix_(here, there)] += 1
        assert np.array_equal(trace.statistics(router).next_layer, counts)


def test_a_recording_replays_to_the_statistics_of_the_cache(plain, folder, token_ids):
    model = offloaded(plain, folder, policy="least_stale", arithmetic="fast")
    with routing.record_routing(model) as recorder, model.moe_offload.trace() as visits:
        generate(model, token_ids)
    trace = recorder.trace.to_cache_trace()
    assert len(trace.step_tokens) == NEW_TOKENS
    assert [(visit.layer, visit.step) for visit in trace.visits] == [(v.layer, v.step) for v in visits.visits]
    assert [set(visit.wanted) for visit in trace.visits] == [set(visit.wanted) for visit in visits.visits]


def test_the_table_of_a_recording_has_the_turn(plain, token_ids):
    with routing.record_routing(plain) as recorder, torch.no_grad():
        plain(token_ids)
    table = recorder.trace.to_pandas()
    assert not table.duplicated(["router", "sequence", "position", "turn"]).any()
    assert table.groupby("router").turn.max().tolist() == [0, 0, 2, 2, 0, 0]


def test_a_strategy_with_random_numbers_repeats_them_where_layers_are_computed_again_for_their_gradients(token_ids):
    gradients = []
    for checkpoints in (False, True):
        model = build(NAME).train()
        if checkpoints:
            model.activation_checkpointing_enable()
        with routing.set_routing(model, "gumbel", seed=3):
            model(token_ids, use_cache=False).logits.square().mean().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
def test_gradients_through_all_turns_of_a_layer_are_those_of_the_plain_model(folder, token_ids, arithmetic):
    plain = build(NAME)
    model = offloaded(plain, folder, "15%", arithmetic=arithmetic)
    own = training.unfreeze_experts(model, {2: [0, 3]})
    for one in (plain, model):
        one(token_ids, use_cache=False).logits.square().mean().backward()
    expected = dict(plain.named_parameters())
    compared = {name: one.grad for name, one in model.named_parameters() if name in expected and one.grad is not None}
    assert len(compared) > 100
    for name, gradient in compared.items():
        torch.testing.assert_close(gradient, expected[name].grad, atol=1e-6, rtol=1e-3, msg=name)
    parameters = dict(model.named_parameters())
    for name in own:
        stack, expert = named(name, model)
        torch.testing.assert_close(parameters[name].grad, expected[stack].grad[expert], atol=1e-6, rtol=1e-3, msg=name)


def named(name, model):
    """The stack of the plain model and the number in it that an expert's own parameter stands for."""
    path = model.moe_offload.layers[2].name
    *_, expert, field = name.removeprefix(f"{path}.").split(".")
    return f"{path}.{field}", int(expert)
