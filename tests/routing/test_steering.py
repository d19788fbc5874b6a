"""Experts that two domains choose differently often, and models that are steered by them."""

import pytest
import torch

from transformers_moe_offload import ConfigError, cache_stats, routing
from transformers_moe_offload.routing import RouterCall
from transformers_moe_offload.routing.strategy import make_strategy
from transformers_moe_offload.tracing import TraceError
from zoo.build import build

NEVER = -torch.inf


def choice(scores, top_k=2, **options):
    call = RouterCall(torch.tensor(scores), top_k, has_affinities=False)
    return make_strategy("steer", options).choose(call)


def kept(chosen):
    return [set(row.tolist()) for row in chosen.experts]


def recording(model, domains):
    """Texts of one row each, by domain."""
    with routing.record_routing(model, scores=None) as recorder, torch.no_grad():
        for domain, texts in domains.items():
            recorder.domain = domain
            for text in texts:
                model(text[None])
    return recorder.trace


def texts(seed, count, length=40, most=40):
    return torch.randint(1, most, (count, length), generator=torch.Generator().manual_seed(seed))


def test_promoted_experts_come_first_and_suppressed_ones_last():
    scores = [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
    assert kept(choice(scores, promote=[3])) == [{3, 0}, {3, 2}]
    assert kept(choice(scores, suppress=[0, 3])) == [{1, 2}, {1, 2}]
    assert kept(choice(scores, promote=[0, 3])) == [{0, 3}, {0, 3}]
    assert kept(choice(scores, promote={0: [1]}, suppress={0: [0, 3]})) == [{1, 2}, {1, 2}]
    assert choice(scores, promote={5: [1]}) is None


def test_what_the_architecture_rules_out_stays_out_and_suppressed_experts_are_a_last_resort():
    assert kept(choice([[NEVER, 3.0, 2.0, 1.0]], promote=[0])) == [{1, 2}]
    assert kept(choice([[NEVER, 3.0, 2.0, NEVER]], suppress=[1])) == [{1, 2}]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_a_promoted_expert_weighs_as_much_as_the_best_one(name):
    model = build(name).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with routing.record_routing(model) as own, torch.no_grad():
        model(ids)
    with routing.set_routing(model, "steer", promote=[1]), routing.record_routing(model) as steered, torch.no_grad():
        model(ids)
    before, after = (next(one.trace.rows(0)) for one in (own, steered))
    for row in range(4):
        best, promoted = before.experts[row].tolist(), after.experts[row].tolist()
        assert 1 in promoted
        weight = after.weights[row][promoted.index(1)]
        if name == "deepseek_v3":  # a correction counts for the choice, and not for weights
            assert weight > 0
        else:
            assert weight == pytest.approx(after.weights[row].max(), rel=1e-4)
        assert set(promoted) - {1} <= set(best)


def test_a_suppressed_expert_is_not_even_loaded(offloaded):
    ids = torch.tensor([[1, 2, 3, 4]])
    with routing.set_routing(offloaded, "steer", suppress=[0, 1, 2, 3]), torch.no_grad():
        offloaded(ids)
    trace_layers = cache_stats(offloaded).per_layer.values()
    assert all(layer.asked <= 4 for layer in trace_layers)


def test_a_model_is_steered_by_what_a_contrast_finds(plain):
    trace = recording(plain, {"low": texts(0, 8), "high": texts(1, 8) + 50})
    found = trace.contrast("high", "low")
    assert found.unit == "text"
    assert found.domains == ("high", "low")
    assert len(found.experts) == 4 * 8
    assert found.significant()[0].difference == max((one.difference for one in found.significant()), key=abs)
    options = found.steering(promote=4, suppress=4)
    assert 1 <= sum(map(len, options["promote"].values())) <= 4
    assert all(len(experts) <= 2 for experts in options["promote"].values())
    with routing.set_routing(plain, "steer", **options):
        steered = recording(plain, {"low": texts(2, 8), "high": texts(3, 8) + 50})
    for router, experts in options["promote"].items():
        assert (steered.preferences(router)[:, experts] > 0).all()
        load = steered.statistics(router).load
        assert all(load[expert] == load.max() for expert in experts)
    for router, experts in options["suppress"].items():
        assert steered.statistics(router).load[experts].sum() == 0


def test_rates_are_shares_of_tokens(plain):
    trace = recording(plain, {"low": texts(0, 8), "high": texts(1, 8) + 50})
    one = trace.contrast("low", "high").experts[0]
    rows = next(trace.rows(one.router))
    chose = (rows.experts == one.expert).any(axis=1)
    assert one.rate == pytest.approx(chose[rows.domain == 0].mean())
    assert one.other_rate == pytest.approx(chose[rows.domain == 1].mean())


def test_texts_of_one_kind_do_not_differ(plain):
    trace = recording(plain, {"one": texts(0, 12), "other": texts(1, 12)})
    found = trace.contrast("one", "other")
    assert len(found.significant()) <= 1
    if not found.significant():
        with pytest.raises(TraceError, match="of 32 experts none differs between 'one' and 'other'"):
            found.steering()


def test_few_long_texts_are_compared_by_runs_of_tokens(plain):
    trace = recording(plain, {"low": texts(0, 1, 320), "high": texts(1, 1, 320) + 50})
    assert trace.contrast("low", "high").unit == "run"
    short = recording(plain, {"low": texts(0, 1, 320), "high": texts(1, 1, 60) + 50})
    with pytest.raises(TraceError, match="'high' has 2 runs of up to 32 neighbouring tokens, and 8 are needed"):
        short.contrast("low", "high")


def test_domains_of_a_contrast_are_checked(plain):
    trace = recording(plain, {"low": texts(0, 1)})
    with pytest.raises(ConfigError, match="domain 'high' is not in the trace, which has low"):
        trace.contrast("low", "high")
    with pytest.raises(ConfigError, match="'low' is compared with itself"):
        trace.contrast("low", "low")
    with routing.record_routing(plain) as recorder, torch.no_grad():
        plain(texts(0, 1))
    with pytest.raises(ConfigError, match="which has none"):
        recorder.trace.contrast("low", "high")


def test_figures_of_a_contrast_are_checked(plain):
    found = recording(plain, {"low": texts(0, 8), "high": texts(1, 8) + 50}).contrast("low", "high")
    with pytest.raises(ConfigError, match=r"level=1\.5"):
        found.significant(1.5)
    with pytest.raises(ConfigError, match="promote=-1"):
        found.steering(promote=-1)
    assert found.steering(promote=0)["promote"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither promote nor suppress"),
        ({"promote": []}, "neither promote nor suppress"),
        ({"promote": 3}, "promote=3 is not a list"),
        ({"promote": "3"}, "promote='3' is not a list"),
        ({"suppress": {"a": [1]}}, "not numbers of routers"),
        ({"promote": [1, 1]}, "names an expert twice"),
        ({"promote": [-1]}, "is not a list of numbers"),
        ({"promote": [1], "suppress": [2, 1]}, "expert 1 of router 0 is in promote and in suppress"),
        ({"promote": {2: [1]}, "suppress": [1]}, "expert 1 of router 2 is in promote and in suppress"),
        ({"promote": [8]}, "promote has expert 8, but router 0 has experts 0 to 7"),
        ({"suppress": {3: [9]}}, "suppress has expert 9, but router 3"),
        ({"suppress": {4: [1]}}, "suppress names router 4, but the model has routers 0 to 3"),
        ({"promote": [1, 2, 3]}, "promote has 3 experts of router 0, but a token takes 2"),
        ({"suppress": [0, 1, 2, 3, 4, 5, 6]}, "leaves router 0 with 1 of 8 experts, and a token takes 2"),
    ],
)
def test_experts_that_cannot_be_steered_by_are_refused(plain, options, message):
    with pytest.raises(ConfigError, match=message):
        routing.set_routing(plain, "steer", **options)
