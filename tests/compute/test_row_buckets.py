"""Experts get one of few numbers of rows where each number costs a kernel, and results are those of the rows wanted."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.compute.forward import outputs_of
from transformers_moe_offload.compute.row_buckets import padded, padded_count
from transformers_moe_offload.compute.token_grouping import group_by_expert
from transformers_moe_offload.formats.base import AS_USED
from transformers_moe_offload.kernels.dense import FEW_ROWS

HALF, FLOAT = torch.empty(0, dtype=torch.float16), torch.empty(0)


def test_up_to_four_thousand_rows_there_are_few_numbers():
    counts = {padded_count(count, HALF) for count in range(FEW_ROWS + 1, 4097)}
    assert len(counts) == 28
    assert all(padded_count(count, HALF) == count for count in counts)


@given(st.integers(FEW_ROWS + 1, 1 << 20))
def test_no_row_is_left_out_and_at_most_a_quarter_is_added_to_more_than_a_few(count):
    assert count <= padded_count(count, HALF) <= max(count * 5 / 4, count + 15)


@given(st.integers(0, 1 << 20))
def test_what_needs_no_kernel_for_each_number_is_left_alone(count):
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert padded_count(count, FLOAT) == padded_count(count, on_a_gpu) == count
    assert padded_count(min(count, FEW_ROWS), HALF) == min(count, FEW_ROWS)


def test_under_autocast_products_are_in_half_precision_whatever_the_rows_are():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert padded_count(17, FLOAT) == 32
    assert padded_count(17, FLOAT) == 17


@pytest.mark.parametrize("count", [1, FEW_ROWS, FEW_ROWS + 1, 16, 50])
def test_the_first_token_fills_up(count):
    tokens = torch.arange(100, 100 + count)
    found = padded(tokens, HALF)
    assert torch.equal(found[:count], tokens)
    assert found[count:].tolist() == [100] * (padded_count(count, HALF) - count)
    assert padded(tokens.tolist(), HALF) == found.tolist()


def test_prompts_of_any_length_give_an_expert_few_numbers_of_rows():
    counts = []

    def mlp(experts, rows, weights):
        counts.append(len(rows))
        return 2 * rows

    for length in range(9, 60):
        hidden = torch.arange(length, dtype=torch.float16)[:, None].expand(-1, 4)
        grouping = group_by_expert(torch.zeros(length, 1, dtype=torch.int64), torch.ones(length, 1), 1)
        found = outputs_of(mlp, None, hidden, grouping, {0: {}}, AS_USED)[0]
        assert torch.equal(found, 2 * hidden)
    assert set(counts) == {16, 32, 48, 64}
