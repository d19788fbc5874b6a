import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.layers import EXPERTS, MLP, E, H, Layer, inputs
from transformers_moe_offload.compute.forward import sparse_forward

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    return {dtype: Layer(tmp_path_factory.mktemp("layer"), dtype) for dtype in DTYPES}


def forward(cache, hidden, index, weights, **options):
    return sparse_forward(cache, 0, MLP, EXPERTS, hidden, index, weights, **options)


@settings(deadline=None, max_examples=60)
@given(num_tokens=st.integers(1, 60), num_choices=st.integers(1, E), slots=st.integers(1, E), seed=st.integers(0, 999))
def test_the_layer_computes_what_the_obvious_loop_computes(layers, num_tokens, num_choices, slots, seed):
    layer = layers[torch.float64]
    hidden, index, weights = inputs(num_tokens, num_choices, torch.float64, seed)
    out = forward(layer.cache(slots), hidden, index, weights)
    torch.testing.assert_close(out, layer.by_loop(hidden, index, weights, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 24, 64])
def test_the_result_is_the_same_bit_for_bit_at_every_cache_size_and_whatever_is_resident(layers, num_tokens, dtype):
    hidden, index, weights = inputs(num_tokens, 3, dtype)
    expected = forward(layers[dtype].cache(E), hidden, index, weights)
    for num_slots in range(1, E + 1):
        cache = layers[dtype].cache(num_slots)
        for seed in range(4):
            assert torch.equal(forward(cache, hidden, index, weights), expected)
            forward(cache, *inputs(2, 3, dtype, seed))  # leaves others resident


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_idle_pairs_add_nothing_and_fetch_nothing(layers, num_tokens):
    layer = layers[torch.float64]
    hidden, index, weights = inputs(num_tokens, 3, torch.float64)
    index[:, 0] = E  # expert parallelism's mark for an expert of another rank
    index[:, 1] = 5
    weights[:, 1] = 0
    index[:, 2] = 2
    cache = layer.cache(E)
    out = forward(cache, hidden, index, weights)
    torch.testing.assert_close(out, layer.by_loop(hidden, index, weights, torch.float64))
    assert [expert.expert for expert in cache.residency.residents] == [2]


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_layer_in_which_every_pair_is_idle_gives_zeros(layers, num_tokens):
    hidden, index, weights = inputs(num_tokens, 3, torch.float32)
    out = forward(layers[torch.float32].cache(2), hidden, torch.full_like(index, E), weights)
    assert torch.equal(out, torch.zeros(num_tokens, H))


def test_no_tokens_give_no_rows(layers):
    hidden, index, weights = (tensor[:0] for tensor in inputs(1, 3, torch.float32))
    assert forward(layers[torch.float32].cache(2), hidden, index, weights).shape == (0, H)


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_a_token_may_name_the_same_expert_twice(layers, num_tokens):
    layer = layers[torch.float64]
    hidden, index, weights = inputs(num_tokens, 3, torch.float64)
    index[:, 1] = index[:, 0]
    out = forward(layer.cache(2), hidden, index, weights)
    torch.testing.assert_close(out, layer.by_loop(hidden, index, weights, torch.float64))


def test_the_result_has_the_dtype_of_the_hidden_states_whatever_the_weights_have(layers):
    hidden, index, weights = inputs(3, 2, torch.bfloat16)
    out = forward(layers[torch.bfloat16].cache(2), hidden, index, weights.float())
    assert out.dtype == torch.bfloat16


def test_routing_weights_are_used_in_full_and_not_rounded_to_the_dtype_of_the_hidden_states(layers):
    hidden, index, _ = inputs(64, 1, torch.bfloat16)
    layer = layers[torch.bfloat16]
    cache = layer.cache(E)
    exact = torch.full((64, 1), 1.0035)  # rounds to 1 in bfloat16
    rows = forward(cache, hidden, index, torch.ones(64, 1, dtype=torch.bfloat16)).float()
    assert torch.equal(forward(cache, hidden, index, exact), (rows * 1.0035).bfloat16())
    assert not torch.equal((rows * 1.0035).bfloat16(), rows.bfloat16())


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_is_at_least_as_close_to_float64_as_a_plain_loop_in_bfloat16(layers, seed):
    layer = layers[torch.bfloat16]
    hidden, index, weights = inputs(64, 4, torch.bfloat16, seed)
    reference = layer.by_loop(hidden, index, weights, torch.float64)
    plain = layer.by_loop(hidden, index, weights, torch.bfloat16)
    ours = forward(layer.cache(2), hidden, index, weights)
    assert (ours.double() - reference).square().mean() <= (plain.double() - reference).square().mean()


def test_only_the_experts_that_tokens_chose_are_asked_for(layers):
    hidden, index, weights = inputs(5, 2, torch.float32)
    cache = layers[torch.float32].cache(E)
    forward(cache, hidden, index, weights)
    assert cache.stats[0].misses == len(index.unique())
