import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.compute import token_grouping
from transformers_moe_offload.compute.token_grouping import FEW_PAIRS, group_by_expert

# T tokens, K experts per token, E experts, P = T * K pairs


def as_list(tokens):
    return [int(token) for token in tokens]


def obvious(top_k_index, top_k_weights, num_experts, keep_zero_weights):
    """Pairs by expert, each pair by its number: {expert: [pair, ...]}, and the idle ones."""
    pairs, idle = {}, []
    for pair, (expert, weight) in enumerate(
        zip(top_k_index.flatten().tolist(), top_k_weights.flatten().tolist(), strict=True)
    ):
        if expert >= num_experts or (weight == 0 and not keep_zero_weights):
            idle.append(pair)
        else:
            pairs.setdefault(expert, []).append(pair)
    return dict(sorted(pairs.items())), idle


def check(top_k_index, top_k_weights, num_experts, keep_zero_weights=False):
    pairs, idle = obvious(top_k_index, top_k_weights, num_experts, keep_zero_weights)
    num_choices = top_k_index.shape[1]
    grouping = group_by_expert(top_k_index, top_k_weights, num_experts, keep_zero_weights=keep_zero_weights)
    assert grouping.experts == list(pairs)
    assert grouping.has_idle == bool(idle)
    for expert, tokens in grouping.tokens.items():
        assert as_list(tokens) == [pair // num_choices for pair in pairs[expert]]
    stacked = [pair for expert in pairs for pair in pairs[expert]]
    expected = [stacked.index(pair) if pair in stacked else len(stacked) for pair in range(top_k_index.numel())]
    assert torch.as_tensor(grouping.row_of_pair).tolist() == expected
    assert torch.as_tensor(grouping.row_of_pair, dtype=torch.int64).shape == (top_k_index.numel(),)


@st.composite
def routings(draw):
    """Any index up to one past the last expert's and any weight, zero often among them."""
    num_experts, num_choices = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    num_tokens = draw(st.integers(1, 20))
    seed, share_idle = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.3, 1.0]))
    random = torch.Generator().manual_seed(seed)
    index = torch.randint(0, num_experts + 2, (num_tokens, num_choices), generator=random)
    weights = torch.rand(num_tokens, num_choices, generator=random) + 0.1
    weights[torch.rand(num_tokens, num_choices, generator=random) < share_idle] = 0
    return index, weights, num_experts


@given(routings(), st.booleans())
def test_pairs_are_grouped_as_the_obvious_loop_groups_them(routing_of_a_layer, keep_zero_weights):
    """Up to 160 pairs, so both ways of grouping are met."""
    check(*routing_of_a_layer, keep_zero_weights)


@given(routings(), st.booleans())
def test_both_ways_of_grouping_agree(routing_of_a_layer, keep_zero_weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_grouping, "FEW_PAIRS", 0)
        check(*routing_of_a_layer, keep_zero_weights)
        patch.setattr(token_grouping, "FEW_PAIRS", 10**6)
        check(*routing_of_a_layer, keep_zero_weights)


@pytest.mark.parametrize("num_pairs", [FEW_PAIRS - 1, FEW_PAIRS, FEW_PAIRS + 1])
def test_the_number_of_pairs_at_which_the_way_changes_is_not_special(num_pairs):
    index = (torch.arange(num_pairs) * 7 % 11).unsqueeze(1)
    check(index, torch.ones(num_pairs, 1), 10)


def test_the_tokens_of_an_expert_are_in_ascending_order():
    grouping = group_by_expert(torch.tensor([[1, 0], [0, 1], [1, 2]]), torch.ones(3, 2), 3)
    assert {expert: as_list(tokens) for expert, tokens in grouping.tokens.items()} == {0: [0, 1], 1: [0, 1, 2], 2: [2]}


@pytest.mark.parametrize("sentinel", [4, 5, 100])
@pytest.mark.parametrize("num_tokens", [1, 200])
def test_an_index_past_the_last_expert_needs_nobody(num_tokens, sentinel):
    index = torch.tensor([[sentinel, 2]]).repeat(num_tokens, 1)
    grouping = group_by_expert(index, torch.ones(num_tokens, 2), 4)
    assert grouping.experts == [2]
    assert grouping.has_idle
    assert set(torch.as_tensor(grouping.row_of_pair)[0::2].tolist()) == {num_tokens}, "all share the row after the last"


@pytest.mark.parametrize("num_tokens", [1, 200])
def test_a_pair_of_weight_zero_needs_nobody_unless_its_gradient_is_wanted(num_tokens):
    index = torch.tensor([[0, 1]]).repeat(num_tokens, 1)
    weights = torch.tensor([[1.0, 0.0]]).repeat(num_tokens, 1)
    assert group_by_expert(index, weights, 4).experts == [0]
    assert group_by_expert(index, weights, 4, keep_zero_weights=True).experts == [0, 1]


@pytest.mark.parametrize("num_tokens", [1, 200])
def test_when_every_pair_is_idle_nobody_is_needed(num_tokens):
    grouping = group_by_expert(torch.zeros(num_tokens, 2, dtype=torch.int64), torch.zeros(num_tokens, 2), 4)
    assert grouping.experts == []
    assert grouping.has_idle
    assert set(torch.as_tensor(grouping.row_of_pair).tolist()) == {0}


def test_no_tokens_need_nobody():
    check(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 4)
