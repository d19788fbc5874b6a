"""What each strategy chooses, from scores written down by hand."""

# T tokens, K experts per token, E experts

import pytest
import torch

from transformers_moe_offload import ConfigError, MoeOffloadError
from transformers_moe_offload.routing import RouterCall
from transformers_moe_offload.routing.choice import best
from transformers_moe_offload.routing.strategies.clusters import centroids_of
from transformers_moe_offload.routing.strategy import make_strategy

NEVER = -torch.inf
MANY = 4000


def call(scores, top_k=2, **facts):
    return RouterCall(torch.tensor(scores), top_k, has_affinities=facts.pop("has_affinities", False), **facts)


def chosen(strategy, of, **options):
    """A set of experts for each token."""
    experts, is_kept, *_ = make_strategy(strategy, options).choose(of)
    kept = torch.ones_like(experts, dtype=torch.bool) if is_kept is None else is_kept
    return [set(row[keeps].tolist()) for row, keeps in zip(experts, kept, strict=True)]


def shares(strategy, of, **options):
    """How often each expert is chosen, per token."""
    experts = make_strategy(strategy, options).choose(of).experts
    return torch.bincount(experts.flatten(), minlength=of.num_experts) / of.num_tokens


def test_probabilities_are_a_softmax_of_logits_and_shares_of_affinities():
    logits, affinities = [[0.0, 1.0, 2.0]], [[0.2, 0.1, 0.1]]
    assert torch.allclose(call(logits).probabilities, torch.tensor(logits).softmax(-1))
    assert torch.allclose(call(affinities, has_affinities=True).probabilities, torch.tensor([[0.5, 0.25, 0.25]]))


def test_an_affinity_that_a_correction_took_below_zero_is_next_to_impossible_but_not_ruled_out():
    of = call([[0.5, -0.1, NEVER]], has_affinities=True)
    assert of.probabilities[0, 1] < 1e-30
    assert torch.isfinite(of.logits[0, 1])
    assert of.logits[0, 2] == NEVER


def test_a_token_that_may_take_fewer_experts_than_k_takes_those():
    choice = best(torch.tensor([[3.0, 2.0, 1.0], [NEVER, 5.0, NEVER]]), 2)
    assert choice.experts[0].tolist() == [0, 1]
    assert choice.experts[1, 0] == 1
    assert choice.is_kept.tolist() == [[True, True], [True, False]]


def test_top_k_leaves_the_models_own_number_to_the_model():
    of = call([[0.0, 3.0, 1.0, 2.0]])
    assert make_strategy("top_k", {}).choose(of) is None
    assert make_strategy("top_k", {"k": 2}).choose(of) is None
    assert chosen("top_k", of, k=3) == [{1, 2, 3}]


def test_top_p_takes_as_few_as_have_the_share():
    of = call([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]], has_affinities=True)
    assert chosen("top_p", of, p=0.5) == [{0}, {0, 1}]
    assert chosen("top_p", of, p=0.65) == [{0, 1}, {0, 1}]
    assert chosen("top_p", of, p=1.0) == [{0, 1, 2}, {0, 1, 2}]
    assert chosen("top_p", of, p=1.0, most=1) == [{0}, {0}]


def test_random_experts_are_all_alike_or_in_proportion():
    of = call([[0.6, 0.3, 0.1, 0.0]] * MANY, top_k=1, has_affinities=True)
    assert torch.allclose(shares("random", of), torch.tensor([0.25] * 4), atol=0.03)
    proportional = shares("random", of, weighting="proportional")
    assert torch.allclose(proportional, torch.tensor([0.6, 0.3, 0.1, 0.0]), atol=0.03)
    assert torch.equal(proportional, shares("gumbel", of, temperature=1.0))


def test_a_temperature_near_zero_is_the_routers_choice_and_a_high_one_is_chance():
    of = call([[2.0, 1.0, 0.0, -1.0]] * MANY)
    assert chosen("temperature", of, temperature=1e-4) == [{0, 1}] * MANY
    assert torch.allclose(shares("temperature", of, temperature=1e4), torch.tensor([0.5] * 4), atol=0.03)
    in_between = shares("gumbel", call([[2.0, 1.0]] * MANY, top_k=1), temperature=2.0)
    assert torch.allclose(in_between, (torch.tensor([2.0, 1.0]) / 2).softmax(-1), atol=0.03)


def test_noise_of_no_width_changes_nothing_and_wide_noise_hides_the_scores():
    of = call([[2.0, 1.0, 0.0, -1.0]] * MANY)
    assert chosen("noise", of, std=0) == [{0, 1}] * MANY
    assert torch.allclose(shares("noise", of, std=1e4), torch.tensor([0.5] * 4), atol=0.03)


@pytest.mark.parametrize("strategy", ["random", "gumbel", "noise"])
def test_chance_depends_on_seed_layer_and_forward_and_on_nothing_else(strategy):
    scores = torch.zeros(40, 8).tolist()
    first = chosen(strategy, call(scores, layer=1, forward=2))
    assert chosen(strategy, call(scores, layer=1, forward=2)) == first
    assert chosen(strategy, call(scores, layer=1, forward=2), seed=1) != first
    assert chosen(strategy, call(scores, layer=2, forward=2)) != first
    assert chosen(strategy, call(scores, layer=1, forward=3)) != first


def test_a_hash_gives_a_token_the_same_experts_wherever_it_is_and_all_experts_their_share():
    of = call(torch.randn(MANY, 8).tolist(), token_ids=torch.arange(MANY) % 2000)
    experts = chosen("hash", of)
    assert experts[:2000] == experts[2000:]
    assert torch.allclose(shares("hash", of), torch.tensor([0.25] * 8), atol=0.03)
    assert chosen("hash", of, seed=1) != experts
    assert chosen("hash", call(of.scores.tolist(), token_ids=of.token_ids, layer=1)) != experts


@pytest.mark.parametrize("strategy", ["random", "gumbel", "noise", "hash", "drop", "top_p", "expert_choice"])
def test_experts_that_the_architecture_rules_out_stay_out(strategy):
    scores = [[NEVER, NEVER, 0.3, 0.1, 0.2, 0.4]] * 50
    of = call(scores, has_affinities=True, token_ids=torch.arange(50))
    options = {"drop": {"experts": [3]}, "top_p": {"p": 1.0}}.get(strategy, {})
    assert not set().union(*chosen(strategy, of, **options)) & {0, 1}


def test_fixed_experts_are_everybodys_and_dropped_ones_nobodys():
    of = call([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 1.0]])
    assert chosen("fixed", of, experts=[2, 0, 1]) == [{0, 1, 2}] * 2
    assert chosen("fixed", of, experts={0: [3]}) == [{3}] * 2
    assert chosen("drop", of, experts=[1]) == [{2, 3}, {0, 3}]


def test_each_expert_chooses_its_best_tokens():
    scores = [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.5, 0.5]]
    of = call(scores, top_k=1, has_affinities=True)
    assert chosen("expert_choice", of) == [{0}, {0}, {1}, {1}]
    assert chosen("expert_choice", of, capacity_factor=0.5) == [{0}, set(), set(), {1}]
    assert chosen("expert_choice", of, capacity_factor=2.0) == [{0, 1}] * 4


def test_a_token_alone_gets_the_routers_experts_from_strategies_that_balance():
    of = call([[0.1, 0.4, 0.2, 0.3]], has_affinities=True)
    assert chosen("expert_choice", of) == [{1, 3}]
    assert chosen("linear_assignment", of) == [{1, 3}]


def test_a_linear_assignment_is_balanced_and_the_best_there_is():
    of = call([[9.0, 1.0], [8.0, 0.0], [7.0, 5.0], [6.0, 5.0]], top_k=1)
    assert chosen("linear_assignment", of) == [{0}, {0}, {1}, {1}]
    of = call(torch.randn(60, 6, generator=torch.Generator().manual_seed(0)).tolist(), top_k=2)
    assert torch.equal(shares("linear_assignment", of) * 60, torch.full((6,), 20.0))


def test_centroids_are_the_means_of_clusters_and_choose_the_nearest():
    hidden = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0], [-10.0, 1.0]])
    centroids = centroids_of(hidden, torch.tensor([[1], [1], [0], [0], [2]]), 3)
    assert torch.equal(centroids, torch.tensor([[10.0, 1.0], [0.0, 1.0], [-10.0, 1.0]]))
    of = call([[0.0] * 3] * 2, top_k=1, hidden=torch.tensor([[9.0, 0.0], [-2.0, 0.0]]))
    assert chosen("k_means", of, centroids={0: centroids}) == [{0}, {1}]


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("top_k", {"k": 0}, "k=0 is not an integer of at least 1"),
        ("top_p", {"p": 0}, "p=0 is not a number above 0"),
        ("top_p", {"p": 1.5}, "more than all of the probability"),
        ("random", {"weighting": "fair"}, "weighting='fair' is not one of"),
        ("random", {"seed": -1}, "seed=-1 is not an integer of at least 0"),
        ("gumbel", {"temperature": 0}, "temperature=0 is not a number above 0"),
        ("noise", {"std": -1}, "std=-1 is not a number of at least 0"),
        ("noise", {"std": float("nan")}, "std=nan is not a number"),
        ("fixed", {}, "needs experts"),
        ("fixed", {"experts": []}, "names no expert"),
        ("drop", {"experts": [1, 1]}, "names an expert twice"),
        ("drop", {"experts": ["a"]}, "is not a list of numbers of experts"),
        ("expert_choice", {"capacity_factor": 0}, "capacity_factor=0 is not a number above 0"),
        ("k_means", {}, "has no centroids; record with"),
        ("k_means", {"centroids": torch.zeros(8, 4)}, "centroids=Tensor is not a mapping from numbers of routers"),
        ("top_k", {"kk": 2}, "has no option 'kk'; did you mean 'k'"),
        ("topk", {}, "did you mean 'top_k'"),
        (3, {}, "strategy=3 is neither a name nor"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_the_reason(strategy, options, message):
    with pytest.raises(ConfigError, match=message):
        make_strategy(strategy, options)


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("top_k", {"k": 9}, "k=9, but router 3 has 8 experts; choose 8 or fewer"),
        ("top_p", {"most": 9}, "most=9, but router 3 has 8 experts"),
        ("fixed", {"experts": [8]}, "experts has 8, but router 3 has experts 0 to 7"),
        ("fixed", {"experts": {0: [1]}}, r"those of routers \[0\], and not of router 3"),
        ("drop", {"experts": list(range(7))}, "dropping 7 of 8 experts leaves router 3 with 1, and a token takes 2"),
        ("k_means", {"centroids": {0: torch.zeros(8, 4)}}, r"fitted for routers \[0\], and not for router 3"),
        (
            "k_means",
            {"centroids": {3: torch.zeros(4, 4)}},
            "4 centroids for router 3, which has 8 experts; fit as many",
        ),
        ("k_means", {"centroids": {3: torch.full((8, 4), torch.nan)}}, "of router 3 are not all finite numbers"),
    ],
)
def test_an_option_that_does_not_fit_the_router_is_refused_with_both_numbers(strategy, options, message):
    with pytest.raises(ConfigError, match=message):
        make_strategy(strategy, options).check(3, 8, 2)


def test_a_strategy_that_is_made_already_takes_no_options():
    with pytest.raises(ConfigError, match="already has its options"):
        make_strategy(make_strategy("random", {}), {"seed": 1})


def test_too_few_tokens_are_no_basis_for_centroids():
    with pytest.raises(ConfigError, match="2 recorded tokens are too few for 3 centroids"):
        centroids_of(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64), 3)


def test_without_scipy_an_assignment_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(MoeOffloadError, match=r"pip install 'transformers-moe-offload\[research\]'"):
        make_strategy("linear_assignment", {}).check(0, 8, 2)
