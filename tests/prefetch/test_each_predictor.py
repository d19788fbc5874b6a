"""What every registered predictor promises the prefetcher."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.prefetch.predictors import LayerShape, make_predictor, predictor_names

from .layers import SHAPES, hidden_states, routers

each_predictor = pytest.mark.parametrize("name", predictor_names())


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
