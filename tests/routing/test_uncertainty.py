"""Repeats with sampled routing, and what a router's confidence is worth."""

import numpy as np
import pytest
import torch

from transformers_moe_offload import ConfigError, routing


def test_repeats_are_those_that_one_would_run_by_hand(plain, token_ids):
    found = routing.routing_uncertainty(plain, token_ids, "gumbel", temperature=2.0, repeats=3, seed=4)
    runs = []
    for seed in (4, 5, 6):
        with routing.set_routing(plain, "gumbel", temperature=2.0, seed=seed), torch.no_grad():
            runs.append(plain(input_ids=token_ids).logits)
    logits = torch.stack(runs)
    torch.testing.assert_close(found.logit_variance, logits.var(0).mean(-1))
    entropies = torch.special.entr(logits.softmax(-1)).sum(-1).mean(0) / np.log(2)
    torch.testing.assert_close(found.mutual_information, (found.entropy - entropies).clamp(min=0))
    most = logits.argmax(-1).mode(0).values
    torch.testing.assert_close(found.disagreement, (logits.argmax(-1) != most).float().mean(0))
    assert found.repeats == 3


def test_routing_that_hardly_varies_leaves_nothing_uncertain_and_chance_does(plain, token_ids):
    sure = routing.routing_uncertainty(plain, {"input_ids": token_ids}, temperature=1e-6, repeats=2)
    unsure = routing.routing_uncertainty(plain, {"input_ids": token_ids}, "random", repeats=4)
    assert (sure.logit_variance == 0).all()
    assert (sure.disagreement == 0).all()
    assert (unsure.logit_variance > 0).all()
    assert unsure.mutual_information.mean() > sure.mutual_information.mean()


def test_strategies_of_the_model_are_back_afterwards(plain, token_ids):
    with torch.no_grad():
        routing.set_routing(plain, "fixed", experts=[2])
        before = plain(input_ids=token_ids).logits
        routing.routing_uncertainty(plain, token_ids, repeats=2)
        assert torch.equal(plain(input_ids=token_ids).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "hash", "repeats": 1}, "repeats=1 is not an integer of at least 2"),
        ({"strategy": "top_k"}, "draws nothing, so all repeats would be equal"),
        ({"temperature": -1}, "temperature=-1 is not a number above 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused(plain, token_ids, options, message):
    with pytest.raises(ConfigError, match=message):
        routing.routing_uncertainty(plain, token_ids, **options)


def test_calibration_compares_each_router_alone_with_no_change(plain, token_ids):
    found = routing.calibration(plain, [token_ids, token_ids + 1], "random", seed=1)
    assert [one.router for one in found] == [0, 1, 2, 3]
    assert all(one.sureness.shape == one.change.shape == (2 * 2 * 8,) for one in found)
    assert all(np.abs(one.change).max() > 0 for one in found)
    none = routing.calibration(plain, [token_ids], "top_k", layers=[1])
    assert [one.router for one in none] == [1]
    assert (none[0].change == 0).all()
    assert np.isnan(none[0].correlation)


def test_bins_go_from_least_sure_to_most_sure_and_hold_every_token():
    one = routing.RouterCalibration(0, np.array([0.9, 0.1, 0.5, 0.3]), np.array([4.0, 1.0, 3.0, 2.0]))
    assert one.bins(2) == [(0.2, 1.5, 2), (0.7, 3.5, 2)]
    assert one.correlation == pytest.approx(1)


def test_calibration_needs_something_to_predict(plain, token_ids):
    with pytest.raises(ConfigError, match="has nothing to predict"):
        routing.calibration(plain, [token_ids[:, :1]])
    with pytest.raises(ConfigError, match="no batches"):
        routing.calibration(plain, [])
