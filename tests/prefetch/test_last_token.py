import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.prefetch.predictors import make_predictor

from .layers import SHAPES, experts_of


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
