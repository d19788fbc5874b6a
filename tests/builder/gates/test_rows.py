"""From sums to rows: pure functions, checked against what they are defined by."""

import pytest
import torch

from transformers_moe_offload.builder.gates.rows import Sums, drawn_rows, programmed_rows, ridge_rows, targets
from transformers_moe_offload.builder.gates.statistics import LayerStatistics
from transformers_moe_offload.builder.recipe import Gate
from transformers_moe_offload.builder.texts.windows import Batch
from transformers_moe_offload.errors import RecipeError

HIDDEN = 6


def batch(lists, lengths, longest=5, skipped=1):
    """Windows of these lists of texts; the first token of each is not counted, nor are pads."""
    counted = torch.zeros(len(lists), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        counted[row, skipped:length] = True
    tokens = torch.zeros(len(lists), longest, dtype=torch.int64)
    return Batch(tokens, torch.tensor(lists), counted, counted & False)


def summed(batches, hidden, num_experts=2):
    counts = [0] * (2 * num_experts)
    for one in batches:
        for number, size in zip(one.lists.tolist(), one.counted.sum(1).tolist(), strict=True):
            counts[number] += size
    sums = Sums(counts, HIDDEN, second_moment=True)
    for one, states in zip(batches, hidden, strict=True):
        sums.add(one, states)
    return sums


@pytest.fixture
def text():
    """Texts for two experts, the second of which has a negative one; pads and first tokens are full of noise."""
    torch.manual_seed(0)
    batches = [batch([0, 2], [5, 4]), batch([3, 0, 2], [3, 2, 5])]
    return batches, [torch.randn(len(one.lists), 5, HIDDEN) for one in batches]


def of_layer(sums):
    empty = torch.zeros(0, HIDDEN, dtype=torch.bfloat16)
    return LayerStatistics(sums.second_moment, targets(sums), empty, torch.zeros(0, dtype=torch.int64))


def rows_of(batches, hidden, number):
    """Hidden states of one list, (n, H)."""
    return torch.cat(
        [states[one.counted & (one.lists == number)[:, None]] for one, states in zip(batches, hidden, strict=True)]
    )


def test_means_are_over_counted_tokens_only(text):
    batches, hidden = text
    sums = summed(batches, hidden)
    for number in (0, 2, 3):
        torch.testing.assert_close(sums.mean[number].float(), rows_of(batches, hidden, number).mean(0))
    assert torch.equal(sums.mean[1], torch.zeros(HIDDEN, dtype=torch.float64))
    last = torch.stack([hidden[0][1, 3], hidden[1][2, 4]]).mean(0)
    torch.testing.assert_close(sums.mean_last[2].float(), last)
    means = torch.stack([hidden[0][1, 1:4].mean(0), hidden[1][2, 1:5].mean(0)]).mean(0)
    torch.testing.assert_close(sums.mean_of_means[2].float(), means)


def test_ridge_is_the_weighted_least_squares_fit(text):
    batches, hidden = text
    sums = summed(batches, hidden)
    # One row of x for each token, weighted so that each list counts the same, and one for each penalised coefficient.
    x, y = [], []
    for number, target in ((0, [1.0, 0.0]), (2, [0.0, 1.0]), (3, [0.0, -1.0])):
        rows = rows_of(batches, hidden, number).double()
        weight = len(rows) ** -0.5
        x.append(rows * weight)
        y.append(torch.tensor(target, dtype=torch.float64).expand(len(rows), 2) * weight)
    penalty = 0.01 * (torch.cat(x).T @ torch.cat(x)).diagonal().mean()
    x.append(torch.eye(HIDDEN, dtype=torch.float64) * penalty.sqrt())
    y.append(torch.zeros(HIDDEN, 2, dtype=torch.float64))
    expected = torch.linalg.lstsq(torch.cat(x), torch.cat(y)).solution.T

    rows = ridge_rows(sums.second_moment, targets(sums), 0.01)

    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


def test_directions_have_length_one_and_point_away_from_each_other(text):
    sums = summed(*text)
    for gate in (Gate(mode="mean"), Gate(mode="mean", pool="last"), Gate(mode="hidden"), Gate(mode="hidden_avg")):
        rows = programmed_rows(gate, sums)
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(rows[0], -rows[1])
    uncentred = programmed_rows(Gate(mode="mean", center=False), sums)
    torch.testing.assert_close(uncentred[0], sums.mean[0] / sums.mean[0].norm())
    torch.testing.assert_close(
        programmed_rows(Gate(mode="hidden"), sums), programmed_rows(Gate(mode="mean", pool="last"), sums)
    )


def test_negative_prompts_are_taken_away(text):
    sums = summed(*text)
    rows = programmed_rows(Gate(mode="mean", center=False), sums)
    vector = sums.mean[2] - sums.mean[3]
    torch.testing.assert_close(rows[1], vector / vector.norm())


def test_centring_changes_no_softmax(text):
    sums = summed(*text)
    x = torch.randn(7, HIDDEN, dtype=torch.float64)
    weights = [(x @ programmed_rows(Gate(center=center), sums).T).softmax(-1) for center in (True, False)]
    torch.testing.assert_close(*weights)


def test_base_first_scores_the_first_expert_about_one_everywhere():
    torch.manual_seed(0)
    batches = [batch([0] * 40, [5] * 40)]
    states = torch.randn(40, 5, HIDDEN) * 0.1 + torch.ones(HIDDEN)
    rows = programmed_rows(Gate(mode="base_first", regularization=1e-4), summed(batches, [states]))
    scores = states.double() @ rows.T
    assert (scores[..., 0] - 1).abs().max() < 0.5
    assert torch.equal(scores[..., 1], torch.zeros(40, 5, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["random", "uniform", "noise", "orthogonal", "gateless"])
def test_drawn_rows_follow_from_their_seed(mode):
    def draw(seed):
        return drawn_rows(mode, 3, 4, 16, seed=seed, initializer_range=0.02)

    assert draw(0).shape == (3, 4, 16)
    assert torch.equal(draw(0), draw(0))
    assert mode == "gateless" or not torch.equal(draw(0), draw(1))


def test_drawn_rows_have_the_size_their_name_stands_for():
    draw = {mode: drawn_rows(mode, 8, 8, 64, seed=0, initializer_range=0.02) for mode in ("random", "uniform", "noise")}
    assert 0.95 < draw["random"].std() < 1.05
    assert draw["uniform"].abs().max() <= 64**-0.5
    assert 0.019 < draw["noise"].std() < 0.021
    square = drawn_rows("orthogonal", 2, 4, 8, seed=0, initializer_range=0.02)
    torch.testing.assert_close(square @ square.mT, torch.eye(4).expand(2, 4, 4), atol=1e-6, rtol=0)
    with pytest.raises(RecipeError, match="9 experts cannot have orthogonal gates in 8 dimensions"):
        drawn_rows("orthogonal", 2, 9, 8, seed=0, initializer_range=0.02)


def test_an_expert_more_adds_to_what_ridge_is_computed_from(text):
    batches, hidden = text
    every = [batch([4], [5])]
    states = [torch.randn(1, 5, HIDDEN)]
    together = of_layer(summed([*batches, *every], [*hidden, *states], num_experts=3))
    grown = of_layer(summed(batches, hidden)).with_expert(of_layer(summed([batch([0], [5])], states, num_experts=1)))
    torch.testing.assert_close(grown.second_moment, together.second_moment)
    torch.testing.assert_close(
        ridge_rows(grown.second_moment, grown.targets, 0.01),
        ridge_rows(together.second_moment, together.targets, 0.01),
        rtol=1e-5,
        atol=1e-5,
    )
