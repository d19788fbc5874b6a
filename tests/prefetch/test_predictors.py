"""What every registered predictor promises the prefetcher, and what is peculiar to each."""

# T tokens, E experts, H hidden

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.prefetch import predictors
from transformers_moe_offload.prefetch.predictors import (
    HitRates,
    LayerShape,
    NextRouter,
    Prediction,
    make_predictor,
    predictor_names,
    register_predictor,
)

each_predictor = pytest.mark.parametrize("name", predictor_names())

HIDDEN = 4
SHAPES = [LayerShape(0, 6, 2), LayerShape(2, 4, 1), LayerShape(3, 8, 3), LayerShape(7, 4, 4)]
"""Layers with gaps between their numbers and with sizes of their own."""


def routers(shapes=SHAPES):
    """Routers with random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {shape.layer: torch.randn(shape.num_experts, HIDDEN, generator=generator) for shape in shapes}
    return {layer: weight_applied(weight) for layer, weight in weights.items()}


def weight_applied(weight):
    return lambda hidden: hidden @ weight.T


def hidden_states(num_tokens=1, seed=0):
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def experts_of(predictions):
    return [prediction.expert.expert for prediction in predictions]


@st.composite
def passes(draw):
    """Visits of some forward passes: (shape, experts it wanted, layers asked about, tokens), in the order of layers."""
    visits = []
    for _ in range(draw(st.integers(1, 6))):
        num_tokens = draw(st.sampled_from([1, 1, 1, 3, 20]))
        for shape in SHAPES:
            most = min(shape.num_experts, num_tokens * shape.top_k)
            wanted = draw(st.lists(st.integers(0, shape.num_experts - 1), unique=True, max_size=most))
            targets = draw(st.lists(st.sampled_from([s.layer for s in SHAPES]), unique=True, max_size=4))
            visits.append((shape, wanted, targets, num_tokens))
    return visits


@each_predictor
@given(visits=passes(), sees_hidden=st.booleans())
@settings(max_examples=40, deadline=None)
def test_predictions_are_experts_of_the_targets_once_each_and_best_first(name, visits, sees_hidden):
    predictor = make_predictor(name, SHAPES, routers())
    num_experts = {shape.layer: shape.num_experts for shape in SHAPES}
    for shape, wanted, targets, num_tokens in visits:
        predictor.observe(shape.layer, wanted)
        predictions = predictor.predict(shape.layer, targets, hidden_states(num_tokens) if sees_hidden else None)
        named = [prediction.expert for prediction in predictions]
        assert len(set(named)) == len(named)
        assert all(id.layer in targets and 0 <= id.expert < num_experts[id.layer] for id in named)
        assert all(0 <= prediction.confidence <= 1 for prediction in predictions)
        assert all(one.confidence >= other.confidence for one, other in pairwise(predictions))


@each_predictor
@given(visits=passes())
@settings(max_examples=20, deadline=None)
def test_the_same_history_gives_the_same_predictions(name, visits):
    one, other = (make_predictor(name, SHAPES, routers()) for _ in range(2))
    for shape, wanted, targets, num_tokens in visits:
        for predictor in (one, other):
            predictor.observe(shape.layer, wanted)
        hidden = hidden_states(num_tokens)
        assert one.predict(shape.layer, targets, hidden) == other.predict(shape.layer, targets, hidden)


@each_predictor
def test_values_are_plain_python(name):
    """They go into queues and files, where a numpy scalar or a tensor of one element would not be welcome."""
    predictor = trained(name, num_tokens=3)
    predictions = predictor.predict(0, [2, 3], hidden_states())
    assert predictions
    for expert, confidence in predictions:
        assert isinstance(expert, ExpertId)
        assert type(expert.layer) is int
        assert type(expert.expert) is int
        assert type(confidence) is float


@each_predictor
def test_a_fresh_predictor_may_be_asked(name):
    predictions = make_predictor(name, SHAPES, routers()).predict(0, [2, 3], hidden_states())
    assert all(prediction.expert.layer in (2, 3) for prediction in predictions)


@each_predictor
def test_asking_about_no_layer_gets_no_answer(name):
    assert trained(name, num_tokens=2).predict(0, [], hidden_states()) == []


@each_predictor
def test_what_a_layer_wanted_may_be_changed_afterwards_by_the_caller(name):
    one, other = (trained(name, num_tokens=1) for _ in range(2))
    wanted = [0, 1]
    one.observe(0, wanted)
    other.observe(0, wanted)
    expected = other.predict(0, [2], hidden_states())
    wanted.clear()
    assert one.predict(0, [2], hidden_states()) == expected


@each_predictor
def test_confidence_comes_to_match_the_share_of_guesses_that_come_true(name):
    """A layer follows the one before in two tokens of three, and else wants anything."""
    draw = random.Random(0)
    shapes = [LayerShape(0, 8, 1), LayerShape(1, 8, 1)]
    one_hot = torch.eye(8)
    predictor = make_predictor(name, shapes, dict.fromkeys((0, 1), lambda hidden: hidden))
    promised = came_true = 0.0
    for token in range(1500):
        first = 3 if draw.random() < 0.8 else draw.randrange(8)
        second = first if draw.random() < 2 / 3 else draw.randrange(8)
        predictor.observe(0, [first])
        predictions = predictor.predict(0, [1], one_hot[first : first + 1])
        predictor.observe(1, [second])
        if token > 100:
            promised += predictions[0].confidence
            came_true += predictions[0].expert.expert == second
    assert came_true > 500
    assert promised == pytest.approx(came_true, rel=0.1)


def trained(name, num_tokens):
    """A predictor after some tokens, each with the first experts of every layer, asked about the next layers."""
    predictor = make_predictor(name, SHAPES, routers())
    for _ in range(num_tokens):
        for shape in SHAPES:
            predictor.observe(shape.layer, range(shape.top_k))
            predictor.predict(shape.layer, [s.layer for s in SHAPES], hidden_states())
    return predictor


# next_router


def test_next_router_ranks_by_the_scores_of_the_targets_router():
    scores = torch.tensor([[0.0, 5.0, -1.0, 3.0]])
    predictor = make_predictor("next_router", SHAPES, {2: lambda hidden: scores})
    assert experts_of(predictor.predict(0, [2, 3], hidden_states())) == [1, 3]


def test_next_router_knows_nothing_about_the_next_token():
    predictor = make_predictor("next_router", SHAPES, routers())
    assert predictor.predict(3, [0, 2, 3], hidden_states()) == []


def test_next_router_is_silent_without_hidden_states():
    assert make_predictor("next_router", SHAPES, routers()).predict(0, [2], None) == []


def test_next_router_takes_what_several_tokens_agree_on_for_likelier_than_what_one_wants():
    scores = torch.tensor([[9.0, 8.0, 0.0, 0.0], [0.0, 8.0, 9.0, 0.0], [0.0, 9.0, 0.0, 8.0]])
    predictor = make_predictor("next_router", SHAPES, {2: lambda hidden: scores})
    alone = make_predictor("next_router", SHAPES, {2: lambda hidden: scores[:1]})
    predictions = predictor.predict(0, [2], hidden_states(3))
    assert predictions[0].expert == ExpertId(2, 1)
    assert sorted(experts_of(predictions)) == [0, 1, 2, 3]
    assert predictions[0].confidence > alone.predict(0, [2], hidden_states())[0].confidence


def test_next_router_is_surer_of_the_layer_that_it_has_guessed_well():
    predictor = make_predictor("next_router", SHAPES, routers())
    for token in range(50):
        predictor.observe(0, [0, 1])
        predicted = predictor.predict(0, [2, 3], hidden_states(seed=token))
        rightly = [p.expert.expert for p in predicted if p.expert.layer == 2][:1]
        predictor.observe(2, rightly)
        wrongly = set(range(8)) - {p.expert.expert for p in predicted if p.expert.layer == 3}
        predictor.observe(3, sorted(wrongly))
    confidence = {p.expert.layer: p.confidence for p in reversed(predictor.predict(0, [2, 3], hidden_states()))}
    assert confidence[2] > 0.85
    assert confidence[3] < 0.15


def test_next_router_ranks_last_what_a_router_rules_out():
    scores = torch.tensor([[-torch.inf, -torch.inf, 1.0, 2.0]])
    predictor = make_predictor("next_router", [LayerShape(0, 4, 2), LayerShape(1, 4, 2)], {1: lambda hidden: scores})
    predictions = predictor.predict(0, [1], hidden_states())
    assert experts_of(predictions)[:2] == [3, 2]


def test_next_router_without_any_router_is_an_error_that_names_what_works():
    with pytest.raises(ConfigError, match=r"4 sparse layers .* choose one of \['last_token', 'transition'\]"):
        make_predictor("next_router", SHAPES, {})


# last_token


def test_last_token_repeats_what_the_target_wanted():
    predictor = make_predictor("last_token", SHAPES, {})
    predictor.observe(0, [4, 1])
    predictor.observe(2, [3])
    assert predictor.predict(2, [3], None) == []
    assert sorted(experts_of(predictor.predict(3, [0], None))) == [1, 4]
    predictor.observe(0, [5, 2])
    assert sorted(experts_of(predictor.predict(3, [0], None))) == [2, 5]


@given(st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=8))
def test_last_token_is_as_sure_as_repetition_has_been_frequent(tokens):
    predictor = make_predictor("last_token", SHAPES, {})
    expected, before = SHAPES[2].top_k / SHAPES[2].num_experts, None
    for wanted in tokens:
        if before:
            expected += (len(wanted & before) / len(before) - expected) / 32
        predictor.observe(3, sorted(wanted))
        before = wanted
    assert predictor.predict(2, [3], None)[0].confidence == pytest.approx(expected)


# transition


def test_transition_learns_what_follows_what_also_across_the_end_of_the_token():
    predictor = make_predictor("transition", SHAPES, {})
    for token in range(60):
        odd = token % 2
        predictor.observe(0, [odd, 2 + odd])
        ahead = predictor.predict(0, [2, 3], None)
        predictor.observe(2, [odd])
        predictor.observe(3, [odd, 2 + odd, 4 + odd])
        across = predictor.predict(3, [0], None)
    assert odd == 1
    assert {prediction.expert for prediction in ahead[:4]} == {ExpertId(2, 1), *(ExpertId(3, e) for e in (1, 3, 5))}
    assert sorted(experts_of(across[:2])) == [0, 2]


def test_transition_begins_no_surer_than_chance():
    predictor = make_predictor("transition", SHAPES, {})
    predictor.observe(0, [0, 1])
    assert {prediction.confidence for prediction in predictor.predict(0, [3], None)} == {3 / 8}


def test_transition_follows_a_change_of_habits():
    predictor = make_predictor("transition", SHAPES, {})
    for followers in ([0, 1, 2], [5, 6, 7]):
        for _ in range(40):
            predictor.observe(0, [0, 1])
            predictor.predict(0, [3], None)
            predictor.observe(3, followers)
    predictor.observe(0, [0, 1])
    assert sorted(experts_of(predictor.predict(0, [3], None)[:3])) == [5, 6, 7]


def test_transition_learns_nothing_from_many_tokens_at_once():
    taught, untaught = (make_predictor("transition", SHAPES, {}) for _ in range(2))
    for predictor in (taught, untaught):
        predictor.observe(0, [0, 1])
        predictor.predict(0, [3], None)
    taught.observe(3, range(4, 8))
    for predictor in (taught, untaught):
        predictor.observe(0, [0, 1])
    assert experts_of(taught.predict(0, [3], None)) == experts_of(untaught.predict(0, [3], None))


def test_transition_stays_within_its_memory(monkeypatch):
    monkeypatch.setattr(predictors, "_MOST_TABLE_BYTES", 6 * 8 * 4)
    predictor = make_predictor("transition", SHAPES, {})
    predictor.observe(0, [0, 1])
    assert predictor.predict(0, [3], None)
    assert predictor.predict(0, [2], None) == []


# the list of predictors


def test_hit_rates_never_rise_with_the_rank():
    rates = HitRates(3, expected=0.5)
    for _ in range(20):
        rates.learn([0.5, 1.0, 0.0])
    first, second, third = rates.confidences()
    assert first == second == 0.5 > third


def test_an_unknown_predictor_is_an_error_that_names_those_there_are():
    with pytest.raises(ConfigError, match=r"predictor='next' is not a known predictor; choose one of \['last_token'.*"):
        make_predictor("next", SHAPES, routers())


def test_a_name_that_is_taken_is_refused_and_keeps_its_meaning():
    with pytest.raises(ConfigError, match="'next_router' is already registered"):
        register_predictor("next_router")(object)
    assert isinstance(make_predictor("next_router", SHAPES, routers()), NextRouter)


def test_a_predictor_of_ones_own_is_made_with_the_layers_and_routers(monkeypatch):
    monkeypatch.setattr(predictors, "_FACTORIES", dict(predictors._FACTORIES))

    @register_predictor("always_the_first")
    class AlwaysTheFirst:
        def __init__(self, layers, routers):
            self.layers, self.routers = layers, routers

        def observe(self, layer, wanted):
            pass

        def predict(self, layer, targets, hidden):
            return [Prediction(ExpertId(target, 0), 1.0) for target in targets]

    known = routers()
    made = make_predictor("always_the_first", SHAPES, known)
    assert (made.layers, made.routers) == (SHAPES, known)
    assert "always_the_first" in predictor_names()


def test_routers_of_layers_that_do_not_exist_are_refused():
    with pytest.raises(
        ConfigError, match=r"routers of layers \[1\] were given, but the sparse layers are \[0, 2, 3, 7\]"
    ):
        make_predictor("next_router", SHAPES, {1: lambda hidden: hidden})


def test_two_layers_with_one_number_are_refused():
    with pytest.raises(ConfigError, match="2 layers have 1 different numbers"):
        make_predictor("last_token", [LayerShape(0, 4, 1), LayerShape(0, 4, 1)], {})


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_token_takes_one_expert_at_least_and_all_of_them_at_most(top_k):
    with pytest.raises(ConfigError, match=f"layer 0 has 4 experts, of which a token cannot take {top_k}"):
        make_predictor("last_token", [LayerShape(0, 4, top_k)], {})
