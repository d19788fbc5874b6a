"""The compiled kernels agree with the reference, whatever the shape, the numbers and the processor."""

import threading

import numpy
import pytest
import torch

from transformers_moe_offload.kernels import cpu, dense, native, reference

from .matrices import GROUP_SIZES, META_NBITS, NBITS, random_matrix, random_rows, with_meta

ROUNDING = 5e-7
"""Of a float32 sum, relative to the sum of the magnitudes: some last places."""


def linear(rows, matrix, activations="exact", threads=None):
    """The products of all rows with one matrix."""
    return cpu.linear_each(rows, [len(rows)], [matrix], activations, threads)


def largest_error(found, rows, matrix):
    """Of products (T, N), relative to the sums of their terms' magnitudes."""
    exact = reference.dequantize(matrix, torch.float32).double()
    magnitudes = (rows.double().abs() @ exact.abs().t()).clamp_min(1e-36)  # below, terms are subnormal
    return ((found - rows.double() @ exact.t()).abs() / magnitudes).max().item()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", NBITS)
def test_products_agree_with_the_weights_for_every_shape(instruction_set, nbits, group_size):
    shapes = [(1, 1, 1), (3, 2, 2), (5, 3, 3), (7, 1, 4), (8, 5, 1), (16, 2, 50), (45, 7, 70), (65, 11, 1)]
    for meta_nbits in META_NBITS:
        for matrix_rows, groups, count in shapes:
            matrix = random_matrix(matrix_rows, groups * group_size, nbits, group_size, meta_nbits)
            rows = random_rows(count, groups * group_size)
            assert largest_error(linear(rows, matrix), rows, matrix) < ROUNDING


@pytest.mark.parametrize("nbits", NBITS)
def test_weights_are_rounded_as_the_reference_rounds_them(instruction_set, nbits):
    for meta_nbits in META_NBITS:
        matrix = random_matrix(21, 640, nbits, 32, meta_nbits)
        weights = reference.dequantize(matrix, torch.float32)
        for count in (640, 1):  # a row of the identity picks a weight
            rows = torch.eye(640)[:count]
            assert torch.equal(linear(rows, matrix), weights.t()[:count])


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_extreme_scales_zeros_and_rows_come_out_right(instruction_set, nbits, activations):
    matrix = random_matrix(19, 256, nbits, 64)
    ones = torch.ones(19, 4)
    largest, subnormal = 65504.0, 2.0**-24
    metas = {
        "huge scales": (largest * ones, ones),
        "subnormal scales": (subnormal * ones, ones),
        "scales of zero": (0 * ones, ones),
        "negative scales": (-0.01 * ones, ones),
        "zeros far above": (ones, largest * ones),
        "zeros far below": (ones, -largest * ones),
        "subnormal zeros": (ones, subnormal * ones),
    }
    for what, (scale, zero) in metas.items():
        extreme = with_meta(matrix, scale, zero)
        for size in (1e-30, 1.0, 1e25):
            for count in (1, 3):
                rows = random_rows(count, 256) * size
                error = largest_error(linear(rows, extreme, activations), rows, extreme)
                assert error < (ROUNDING if activations == "exact" else 0.02), what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_half_precision_is_only_a_matter_of_storage(instruction_set, dtype, activations):
    matrix = random_matrix(33, 320, 4, 32)
    for size in (1e-3, 1.0, 300.0):  # products beyond float16's subnormals, in its range, and beyond it
        rows = (random_rows(3, 320) * size).to(dtype)
        rounded = linear(rows.float(), matrix, activations).to(dtype)
        assert torch.equal(linear(rows, matrix, activations), rounded)


def test_every_half_precision_number_is_read_and_written_exactly(instruction_set):
    matrix = with_meta(random_matrix(1, 16, 1, 16), torch.ones(1, 1), torch.ones(1, 1))
    matrix.parts["codes"].zero_()  # all weights -1
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        finite = every[every.isfinite()]
        rows = torch.zeros(len(finite), 16, dtype=dtype)
        rows[:, 5] = finite
        few = [linear(some, matrix)[:, 0] for some in rows.split(dense.FEW_ROWS)]
        assert torch.equal(torch.cat(few), -finite)
        many = linear(rows, matrix)[:, 0]
        is_normal = finite.abs() >= torch.finfo(torch.bfloat16).smallest_normal
        assert torch.equal(many[is_normal], -finite[is_normal])
        assert (
            many[~is_normal].float().abs() <= finite[~is_normal].float().abs()
        ).all()  # processors may take them for 0


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_numbers_that_are_none_spoil_their_own_row_only(instruction_set, activations):
    matrix, rows = random_matrix(9, 192, 4, 64), random_rows(3, 192)
    clean = linear(rows, matrix, activations)
    for broken in (float("nan"), float("inf")):
        rows[1, 70] = broken
        found = linear(rows, matrix, activations)
        assert not found[1].isfinite().any()
        assert torch.equal(found[::2], clean[::2])


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_results_are_the_same_bits_for_any_number_of_threads_and_of_rows(instruction_set, nbits, activations):
    matrix, rows = random_matrix(203, 512, nbits), random_rows(101, 512)
    alone = linear(rows, matrix, activations, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(linear(rows, matrix, activations, threads=threads), alone)
    if activations == "exact":
        for start, stop in ((0, 1), (100, 101), (3, 5), (10, 60)):
            assert torch.equal(linear(rows[start:stop], matrix), alone[start:stop])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", NBITS)
def test_rounding_rows_to_int8_costs_at_most_half_a_step_of_each_group(instruction_set, nbits, group_size):
    for meta_nbits in META_NBITS:
        for matrix_rows, groups, count in ((1, 1, 1), (13, 3, 2), (40, 9, 1)):
            cols = groups * group_size
            matrix, rows = random_matrix(matrix_rows, cols, nbits, group_size, meta_nbits), random_rows(count, cols)
            step = rows.view(count, groups, group_size).abs().amax(2) / 127
            weight = reference.dequantize(matrix, torch.float32).view(matrix_rows, groups, group_size).abs().sum(2)
            most = step.double() @ weight.double().t() / 2
            exact = linear(rows, matrix)
            assert ((linear(rows, matrix, "int8") - exact).abs() <= most + 1e-5 * exact.abs().max()).all()


def test_calls_from_several_threads_do_not_disturb_each_other(instruction_set):
    matrices = [random_matrix(300, 512, nbits, seed=nbits) for nbits in NBITS]
    rows = random_rows(3, 512).bfloat16()
    expected = [linear(rows, matrix, threads=1) for matrix in matrices]
    found = {}

    def work(number):
        found[number] = [linear(rows, matrices[number], threads=2) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(matrices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, products in enumerate(expected):
        assert all(torch.equal(again, products) for again in found[number])


def test_rows_that_are_not_contiguous_are_read_right(instruction_set):
    matrix, wide = random_matrix(16, 128), random_rows(4, 256)
    assert torch.equal(linear(wide[:, ::2], matrix), linear(wide[:, ::2].contiguous(), matrix))


def test_no_rows_have_no_products(instruction_set):
    for dtype in (torch.float32, torch.bfloat16):
        assert linear(torch.empty(0, 128, dtype=dtype), random_matrix(16, 128)).shape == (0, 16)


def test_an_instruction_set_that_does_not_exist_is_not_chosen(instruction_set):
    assert native.choose(native.library(), "nonsense") is None


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_several_products_at_once_have_the_bits_of_each_on_its_own(threads, dtype, activations):
    counts = [1, 3, 1, 60, 2]
    matrices = [random_matrix(48, 128, nbits, 32, 8, seed=nbits) for nbits in (4, 2, 3, 8, 4)]
    rows = torch.randn(sum(counts), 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = cpu.linear_each(rows, counts, matrices, activations, threads)
    parts = zip(rows.split(counts), matrices, strict=True)
    assert torch.equal(found, torch.cat([linear(some, matrix, activations, 1) for some, matrix in parts]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_plain_matrices_are_multiplied_as_exactly_as_float32_can(instruction_set, dtype):
    for matrix_rows, cols, count in [(1, 1, 1), (3, 7, 2), (8, 16, 3), (9, 33, 4), (45, 100, 5), (200, 515, 70)]:
        weight, rows = random_rows(matrix_rows, cols, torch.bfloat16, seed=2), random_rows(count, cols, dtype)
        exact = rows.double() @ weight.double().t()
        magnitudes = rows.double().abs() @ weight.double().abs().t()
        rounding = ROUNDING if dtype == torch.float32 else torch.finfo(dtype).eps
        error = (linear(rows, weight).double() - exact).abs() - torch.finfo(dtype).smallest_normal
        assert (error <= rounding * magnitudes).all()


@pytest.mark.parametrize("offset", [0, 2, 8, 62])
def test_a_row_of_a_plain_matrix_has_the_same_bits_wherever_it_is_and_whoever_is_beside_it(instruction_set, offset):
    weight, rows = random_rows(21, 77, torch.bfloat16, seed=2), random_rows(11, 77, torch.bfloat16)
    raw = torch.empty(weight.nbytes + 64, dtype=torch.uint8)
    moved = raw[offset : offset + weight.nbytes].view(torch.bfloat16).view(weight.shape).copy_(weight)
    alone = torch.cat([linear(row, weight) for row in rows.split(1)])
    assert torch.equal(linear(rows, moved), alone)
    assert torch.equal(linear(rows, moved, threads=2), alone)
    counts, matrices = [3, 0, 7, 1], [moved, weight, weight, moved]
    assert torch.equal(cpu.linear_each(rows, counts, matrices), alone)


def test_one_row_is_shown_to_every_matrix_without_being_copied(instruction_set):
    matrices = [random_rows(5, 40, torch.bfloat16, seed=seed) for seed in range(4)]
    row = random_rows(1, 40, torch.bfloat16)
    expected = torch.cat([linear(row, matrix) for matrix in matrices])
    assert torch.equal(cpu.linear_each(row.expand(4, -1), [1] * 4, matrices), expected)
    assert torch.equal(cpu.linear_each(row.expand(4, -1), [2, 2], matrices[:2]), expected[:2].repeat_interleave(2, 0))
    assert torch.equal(cpu.linear_each(row.expand(2, -1), [2, 0], matrices[:2]), expected[:1].repeat_interleave(2, 0))
    assert torch.equal(cpu.linear_each(row.expand(2, -1), [0, 2], matrices[:2]), expected[1:2].repeat_interleave(2, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_matrix_without_columns_gives_zeros(instruction_set, dtype, count):
    found = linear(torch.empty(count, 0, dtype=dtype), torch.empty(5, 0, dtype=torch.bfloat16))
    assert torch.equal(found, torch.zeros(count, 5, dtype=dtype))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("streams", cpu.STREAMS)
def test_every_line_of_memory_is_read_once(instruction_set, streams, threads):
    """Of what does not fill a line in each of the rows side by side, nothing is."""
    for nbytes in (64, 4096, (1 << 20) + 512, (3 << 20) - 192):
        memory = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
        parts = [part[: len(part) // (64 * streams) * 64 * streams] for part in memory.split(1 << 20)]
        words = torch.cat(parts).view(torch.int64).numpy()
        assert cpu.read_memory(memory, streams, threads) == int(numpy.bitwise_xor.reduce(words)) % 2**64


def test_nothing_of_a_memory_without_bytes_is_read(instruction_set):
    assert cpu.read_memory(torch.empty(0, dtype=torch.uint8), 1, 2) == 0
