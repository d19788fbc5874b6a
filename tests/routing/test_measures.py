"""Formulas against values worked out by hand."""

import numpy as np
import pytest

from transformers_moe_offload.routing import measures


def test_entropy_is_nought_for_certainty_and_full_for_none():
    chances = np.array([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    assert measures.entropy(chances).tolist() == [0, 2, 1]


def test_probabilities_of_affinities_are_shares_and_of_logits_a_softmax():
    affinities = np.array([[0.2, 0.6, -np.inf, -0.1], [-1.0, -1.0, -1.0, -1.0]])
    expected = [[0.25, 0.75, 0, 0], [0.25] * 4]
    assert measures.probabilities(affinities, has_affinities=True) == pytest.approx(np.array(expected))
    logits = np.log(np.array([[0.5, 0.25, 0.25]])) + 7
    assert measures.probabilities(logits, has_affinities=False) == pytest.approx(np.array([[0.5, 0.25, 0.25]]))


def test_margin_and_confidence_tell_the_chosen_from_the_rejected():
    chances = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    experts = np.array([[0, 1, -1], [2, 1, -1], [0, 1, 2]])
    assert measures.margin(chances, experts)[:2] == pytest.approx([0.1, -0.3])
    assert np.isnan(measures.margin(chances, experts)[2])
    assert measures.confidence(chances, experts) == pytest.approx([0.8, 0.5, 1.0])


def test_jaccard_counts_what_two_choices_share():
    one, other = np.array([[0, 1], [0, 1], [-1, -1]]), np.array([[1, 0, -1], [1, 2, 3], [-1, -1, -1]])
    assert measures.jaccard(one, other, 4) == pytest.approx([1, 1 / 4, 1])


@pytest.mark.parametrize(
    ("load", "variation", "gini"), [([5, 5, 5, 5], 0, 0), ([8, 0, 0, 0], np.sqrt(3), 0.75), ([0, 0], 0, 0)]
)
def test_balance_is_nought_for_equal_loads_and_greatest_for_one_expert(load, variation, gini):
    assert measures.variation(np.array(load)) == pytest.approx(variation)
    assert measures.gini(np.array(load)) == pytest.approx(gini)


def test_reuse_distance_counts_the_others_in_between():
    assert measures.reuse_distances([[0, 1], [1], [2], [0]]) == [0, 2]


def test_reuse_distances_say_what_an_lru_cache_hits():
    visits = [[int(expert)] for expert in np.random.default_rng(0).integers(0, 6, 300)]
    distances = measures.reuse_distances(visits)
    for num_slots in range(1, 7):
        cache, hits = [], 0
        for (expert,) in visits:
            if expert in cache:
                hits += 1
                cache.remove(expert)
            cache = [*cache, expert][-num_slots:]
        assert sum(distance < num_slots for distance in distances) == hits


def test_rank_correlation_looks_at_order_only():
    values = np.array([1.0, 2.0, 3.0, 10.0])
    assert measures.rank_correlation(values, values**3) == pytest.approx(1)
    assert measures.rank_correlation(values, -values) == pytest.approx(-1)
    assert np.isnan(measures.rank_correlation(values, np.ones(4)))
    assert measures.rank_correlation(np.array([1.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0])) == pytest.approx(1)
