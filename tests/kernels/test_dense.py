"""bfloat16 matrices on processors without bfloat16 arithmetic."""

import pytest
import torch

from transformers_moe_offload.kernels import dense

from .matrices import random_rows


@pytest.fixture(params=[True, False])
def has_units(request, monkeypatch):
    """Whether the processor is taken to multiply bfloat16 itself."""
    monkeypatch.setattr(dense, "has_bfloat16_units", lambda: request.param)
    return request.param


def test_tiles_are_for_several_rows_in_bfloat16_without_units():
    assert dense.wants_tiles(2, torch.bfloat16, has_units=False)
    assert not dense.wants_tiles(1, torch.bfloat16, has_units=False)
    assert not dense.wants_tiles(2, torch.bfloat16, has_units=True)
    assert not dense.wants_tiles(2, torch.float32, has_units=False)


def test_products_are_at_least_as_close_as_those_of_torch(has_units):
    for matrix_rows, count in ((3, 2), (700, 5), (1024, 1)):
        rows, weight = random_rows(count, 256, torch.bfloat16), random_rows(matrix_rows, 256, torch.bfloat16, seed=2)
        exact = rows.double() @ weight.double().t()
        found = dense.linear(rows, weight)
        assert found.dtype == torch.bfloat16
        theirs = torch.nn.functional.linear(rows, weight)
        assert (found - exact).abs().max() <= (theirs - exact).abs().max() * 1.01


@pytest.mark.parametrize("count", [1, dense.FEW_ROWS, dense.FEW_ROWS + 1])
def test_the_way_depends_on_the_number_of_rows_and_not_on_the_place_of_the_matrix(has_units, count):
    rows, weight = random_rows(count, 96, torch.bfloat16), random_rows(40, 96, torch.bfloat16, seed=2)
    raw = torch.empty(weight.numel() + 8, dtype=torch.bfloat16)
    moved = raw[1 : 1 + weight.numel()].view(weight.shape).copy_(weight)
    assert torch.equal(dense.linear(rows, moved), dense.linear(rows, weight))


def test_few_rows_are_left_to_torch_where_it_has_other_work_to_do():
    rows = random_rows(2, 16, torch.bfloat16)
    assert not dense.reads_fast(rows.float())
    assert not dense.reads_fast(rows.requires_grad_())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not dense.reads_fast(rows.detach())


def test_tiles_round_once():
    rows, weight = random_rows(4, 64, torch.bfloat16), random_rows(600, 64, torch.bfloat16, seed=2)
    in_float32 = (rows.float() @ weight.float().t()).bfloat16()
    torch.testing.assert_close(dense.linear_in_tiles(rows, weight), in_float32, rtol=1e-2, atol=1e-3)
    transposed = weight.t().contiguous().t()
    assert torch.equal(dense.linear_in_tiles(rows, transposed), dense.linear_in_tiles(rows, weight))


def test_gradients_flow_either_way(has_units):
    rows, weight = random_rows(3, 16, torch.bfloat16).requires_grad_(), random_rows(8, 16, torch.bfloat16, seed=2)
    dense.linear(rows, weight).sum().backward()
    torch.testing.assert_close(rows.grad, weight.sum(0).expand(3, 16), rtol=2e-2, atol=2e-2)
