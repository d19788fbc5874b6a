"""Many rows times a packed matrix: processors that add up products of small numbers are used, and nothing is lost."""

import pytest
import torch

from transformers_moe_offload.kernels import dense, reference

from .matrices import GROUP_SIZES, META_NBITS, NBITS, random_matrix, random_rows, with_meta
from .test_cpu import ROUNDING, linear

# Not those of ARM, which have no kernels of their own for many rows and would take minutes on an emulated processor.
pytestmark = pytest.mark.parametrize("instruction_set", ["avx512_bf16", "avx512", "avx2", "portable"], indirect=True)

SHAPES = [(1, 1, 9), (3, 2, 20), (45, 7, 70), (65, 11, 130), (64, 5, 17), (200, 3, 300)]
"""Rows of a matrix, groups in each, rows of input: whole blocks and broken ones, one call of the kernel and several."""


def reference_of(rows, matrix):
    """The products in float64, and the sums of their terms' magnitudes."""
    weights = reference.dequantize(matrix, torch.float32).double()
    return rows.double() @ weights.t(), rows.double().abs() @ weights.abs().t()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", NBITS)
def test_rows_in_bfloat16_are_multiplied_as_exactly_as_float32_can(instruction_set, nbits, group_size):
    for meta_nbits in META_NBITS:
        for matrix_rows, groups, count in SHAPES:
            matrix = random_matrix(matrix_rows, groups * group_size, nbits, group_size, meta_nbits)
            rows = random_rows(count, groups * group_size).bfloat16()
            exact, magnitudes = reference_of(rows, matrix)
            error = (linear(rows, matrix).double() - exact).abs()
            stored = torch.finfo(torch.bfloat16).eps / 2 * exact.abs()
            assert (error <= 1.01 * stored + 4 * ROUNDING * magnitudes).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", NBITS)
def test_rounding_many_rows_costs_at_most_half_a_step_of_each_group(instruction_set, nbits, group_size, dtype):
    for matrix_rows, groups, count in SHAPES:
        cols = groups * group_size
        matrix, rows = random_matrix(matrix_rows, cols, nbits, group_size, 8), random_rows(count, cols).to(dtype)
        step = rows.float().view(count, groups, group_size).abs().amax(2) / 127
        weight = reference.dequantize(matrix, torch.float32).view(matrix_rows, groups, group_size).abs().sum(2)
        most = step.double() @ weight.double().t() / 2
        exact, magnitudes = reference_of(rows, matrix)
        error = (linear(rows, matrix, "int8").double() - exact).abs()
        assert (error <= most + 1.01 * torch.finfo(dtype).eps * exact.abs() + 1e-5 * magnitudes).all()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_extreme_scales_and_zeros_come_out_right(instruction_set, activations, size):
    ones = torch.ones(40, 4)
    rows = (random_rows(30, 256) * size).bfloat16()
    for scale, zero in ((65504 * ones, ones), (2.0**-24 * ones, ones), (0 * ones, ones), (-0.01 * ones, ones),
                        (ones, 65504 * ones), (ones, -65504 * ones), (ones, 2.0**-24 * ones)):  # fmt: skip
        matrix = with_meta(random_matrix(40, 256, 4, 64), scale, zero)
        exact, magnitudes = reference_of(rows, matrix)
        error = (linear(rows, matrix, activations).double() - exact).abs()
        assert (error <= 0.004 * exact.abs() + (1e-5 if activations == "exact" else 0.02) * magnitudes + 1e-36).all()


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_bits_depend_neither_on_the_number_of_threads_nor_on_the_rows_beside(instruction_set, nbits, activations):
    matrix, rows = random_matrix(203, 512, nbits), random_rows(101, 512).bfloat16()
    alone = linear(rows, matrix, activations, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(linear(rows, matrix, activations, threads=threads), alone)
    few = dense.FEW_ROWS
    for start, stop in ((10, 60), (0, few + 1), (101 - few - 1, 101)):
        assert torch.equal(linear(rows[start:stop], matrix, activations), alone[start:stop])


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_spoils_its_own_row_only(instruction_set, activations, broken):
    matrix, rows = random_matrix(40, 192, 4, 64), random_rows(30, 192).bfloat16()
    clean = linear(rows, matrix, activations)
    rows[17, 70] = broken
    found = linear(rows, matrix, activations)
    assert not found[17].isfinite().any()
    others = [number for number in range(30) if number != 17]
    assert torch.equal(found[others], clean[others])
