"""Products with weights as they are stored, a few rows at a time, are those with the weights widened."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transformers_moe_offload.builder.checks.logits import WidenedProducts, product


@given(
    num_tokens=st.integers(1, 3), num_inputs=st.integers(1, 9), num_outputs=st.integers(1, 9), room=st.integers(1, 40)
)
def test_a_product_is_that_of_the_widened_matrix_however_little_room_there_is(
    num_tokens, num_inputs, num_outputs, room
):
    torch.manual_seed(0)
    states = torch.randn(2, num_tokens, num_inputs)
    matrix = torch.randn(num_outputs, num_inputs).bfloat16()
    expected = states.double() @ matrix.double().T
    torch.testing.assert_close(product(states, matrix, torch.empty(room)).double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_layers_take_narrow_weights_in_the_block_and_only_there(has_bias):
    layer, states = nn.Linear(8, 4, bias=has_bias), torch.randn(3, 8)
    narrow = nn.Linear(8, 4, bias=has_bias).bfloat16().requires_grad_(False)
    with WidenedProducts():
        found = narrow(states)
        same = layer(states)
    assert torch.equal(same, layer(states))
    torch.testing.assert_close(found, narrow.float()(states))
    with pytest.raises(RuntimeError):
        narrow.bfloat16()(states)
