"""The Triton kernels agree with the reference: on a GPU, and everywhere else in Triton's interpreter.

Tests marked `gpu` run on a GPU where there is one, and by `test_interpreted.py` anywhere: there Triton interprets its
kernels with numpy.
"""

# N rows, K columns of a matrix, P rows of input, E experts

import importlib.util
import itertools
import random

import pytest
import torch

from interpreted import DEVICE, IS_INTERPRETED
from transformers_moe_offload.kernels import reference
from transformers_moe_offload.kernels.grouped import Pairs, PlacedMatrix
from transformers_moe_offload.kernels.packed import PackedMatrix

from .matrices import GROUP_SIZES, META_NBITS, NBITS, random_matrix, random_rows, with_meta

gpu = pytest.mark.gpu
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if IS_INTERPRETED else 2**-8, torch.float16: 2**-11}
"""Of a product, relative to itself. The interpreter cuts bfloat16 off instead of rounding it."""
SUMMING = 1e-6
"""Of a float32 sum, relative to the sum of its terms' magnitudes."""


@pytest.fixture(scope="module")
def kernels():
    """The package of the kernels, imported in tests only: that decides whether they are interpreted."""
    from transformers_moe_offload.kernels import triton

    return triton


@gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", NBITS)
def test_products_agree_with_the_weights_for_every_shape(kernels, nbits, group_size):
    for matrix_rows, groups, meta_nbits, count in [(1, 1, 16, 1), (77, 3, 8, 1), (3, 2, 16, 2), (37, 1, 8, 17)]:
        matrix = random_matrix(matrix_rows, groups * group_size, nbits, group_size, meta_nbits)
        rows = random_rows(count, groups * group_size)
        assert_agrees(linear(kernels, rows, matrix), rows, matrix)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nbits", NBITS)
def test_half_precision_rounds_nothing_but_the_product(kernels, nbits, dtype):
    for count, group_size, meta_nbits in [(1, 32, 8), (16, 64, 8), (33, 128, 16), (65, 16, 16)]:
        matrix = random_matrix(70, 2 * group_size, nbits, group_size, meta_nbits)
        rows = random_rows(count, 2 * group_size, dtype)
        found = linear(kernels, rows, matrix)
        assert found.dtype == dtype
        assert_agrees(found, rows, matrix)


@gpu
@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("count", [1, 3])
def test_extreme_scales_zeros_and_rows_come_out_right(kernels, nbits, count):
    matrix = random_matrix(19, 32, nbits, 16)
    ones = torch.ones(19, 2)
    largest, subnormal = 65504.0, 2.0**-24
    metas = [
        (largest * ones, ones),
        (subnormal * ones, ones),
        (0 * ones, ones),
        (-0.01 * ones, ones),
        (ones, largest * ones),
        (ones, -largest * ones),
        (ones, subnormal * ones),
    ]
    for scale, zero in metas:
        extreme = with_meta(matrix, scale, zero)
        for size in (1e-25, 1e25):
            rows = random_rows(count, 32) * size
            assert_agrees(linear(kernels, rows, extreme), rows, extreme)


@gpu
def test_no_rows_have_no_products(kernels):
    matrix = random_matrix(8, 64)
    assert linear(kernels, random_rows(0, 64), matrix).shape == (0, 8)
    assert grouped(kernels, random_rows(0, 64), [0, 0], [matrix], tokens=1).shape == (0, 8)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nbits", NBITS)
def test_every_row_is_multiplied_with_the_matrix_of_its_expert(kernels, nbits, dtype):
    for offsets, tokens in [
        ([0, 1, 1, 2, 2, 3], 1),  # one row for each of some experts
        ([0, 0, 2, 2, 5, 6], 3),
        ([0, 17, 17, 18, 35, 35], 20),  # a tile more for one row
    ]:
        matrices = experts(len(offsets) - 1, nbits, 16 if nbits % 2 else 32, META_NBITS[nbits % 2])
        rows = random_rows(offsets[-1], matrices[0].packing.cols, dtype)
        found = grouped(kernels, rows, offsets, matrices, tokens)
        for matrix, (start, stop) in zip(matrices, itertools.pairwise(offsets), strict=True):
            assert_agrees(found[start:stop], rows[start:stop], matrix)


@gpu
@pytest.mark.parametrize("tokens", [1, 4])
def test_rows_that_are_nobodys_come_out_as_zeros(kernels, tokens):
    matrices = experts(3)
    rows = torch.cat([random_rows(2, 64), torch.full((20, 64), torch.nan)])
    found = grouped(kernels, rows, [0, 1, 1, 2], matrices, tokens)
    assert_agrees(found[:1], rows[:1], matrices[0])
    assert_agrees(found[1:2], rows[1:2], matrices[2])
    assert torch.equal(found[2:], torch.zeros(20, matrices[0].packing.rows))


@gpu
@pytest.mark.parametrize("tokens", [1, 4])
def test_where_a_record_lies_makes_no_difference_to_a_bit(kernels, tokens):
    matrices, rows, offsets = experts(3), random_rows(3, 64), [0, 1, 2, 3]
    found = grouped(kernels, rows, offsets, matrices, tokens)
    assert torch.equal(grouped(kernels, rows, offsets, matrices, tokens, shift=4096), found)
    swapped = grouped(kernels, rows[[2, 1, 0]], offsets, matrices[::-1], tokens)
    assert torch.equal(swapped[[2, 1, 0]], found)


@gpu
def test_an_expert_alone_gives_the_bits_it_gives_among_others(kernels):
    matrices, rows = experts(4), random_rows(4, 64, torch.bfloat16)
    together = grouped(kernels, rows, [0, 1, 2, 3, 4], matrices, tokens=1)
    for index, matrix in enumerate(matrices):
        assert torch.equal(linear(kernels, rows[index : index + 1], matrix), together[index : index + 1])


@gpu
def test_there_are_always_as_many_tiles_as_rows_fill(kernels):
    chance = random.Random(0)
    for _ in range(300):
        counts = [chance.choice([0, 1, 15, 16, 17, chance.randrange(70)]) for _ in range(chance.randint(2, 9))]
        for height in (16, 32, 64):
            filled = sum(-(-count // height) for count in counts)
            assert filled <= kernels.grouped.most_tiles(sum(counts), len(counts) - 1, height)  # the last has no expert


def experts(count, nbits=4, group_size=32, meta_nbits=8):
    return [random_matrix(21, 64, nbits, group_size, meta_nbits, seed=seed) for seed in range(count)]


def linear(kernels, rows, matrix):
    parts = {name: part.to(DEVICE) for name, part in matrix.parts.items()}
    return kernels.linear(rows.to(DEVICE), PackedMatrix(matrix.packing, parts)).cpu()


def grouped(kernels, rows, offsets, matrices, tokens, shift=0):
    """By way of one record for each expert that has rows, with ones in all bits around its arrays."""
    packing = matrices[0].packing
    places, end = {}, 64 + shift
    for part in packing.parts:
        places[part.name] = end
        end += -(-part.nbytes // 64) * 64 + 64
    records = []
    for matrix in matrices:
        record = torch.full((end,), 255, dtype=torch.uint8, device=DEVICE)
        for part in packing.parts:
            start = places[part.name]
            record[start : start + part.nbytes] = matrix.parts[part.name].reshape(-1).view(torch.uint8).to(DEVICE)
        records.append(record)
    has_rows = [start < stop for start, stop in itertools.pairwise(offsets)]
    addresses = [record.data_ptr() if wanted else 0 for record, wanted in zip(records, has_rows, strict=True)]
    chosen = [expert for expert, (start, stop) in enumerate(itertools.pairwise(offsets)) for _ in range(start, stop)]
    chosen += [len(matrices)] * (len(rows) - len(chosen))
    pairs = Pairs(
        len(rows),
        torch.tensor(addresses, device=DEVICE),
        choices=1,
        chosen=torch.tensor(chosen, dtype=torch.int64, device=DEVICE),
        offsets=None if tokens == 1 else torch.tensor(offsets, dtype=torch.int32, device=DEVICE),
        rows_per_expert=tokens,
    )
    matrix = PlacedMatrix(packing.rows, packing.cols, places, packing)
    return kernels.grouped.Product(matrix)(rows.to(DEVICE), pairs).cpu()


def assert_agrees(found, rows, matrix):
    """Right up to rounding: of the sum, whose terms may be codes and zeros on their own, and of the product."""
    inputs, exact = rows.double(), reference.dequantize(matrix, torch.float32).double()
    products = inputs @ exact.t()
    metas = reference.scales_and_zeros(matrix)
    scale, zero = (meta.double().repeat_interleave(matrix.packing.group_size, 1) for meta in metas)
    terms = inputs.abs() @ ((2**matrix.packing.nbits + zero.abs()) * scale.abs()).t()
    smallest = 1e-7 if found.dtype == torch.float16 else 1e-36  # half of float16's last place, near zero
    allowed = ROUNDING[found.dtype] * products.abs() + SUMMING * terms + smallest
    assert (found.double() - products).abs().le(allowed).all()
