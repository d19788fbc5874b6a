"""The torch arithmetic agrees with the definition of a packed matrix, and with the hqq package."""

import threading

import pytest
import torch

from transformers_moe_offload.kernels import reference
from transformers_moe_offload.kernels.packed import unpack

from .matrices import GROUP_SIZES, META_NBITS, NBITS, random_matrix, random_rows, weights


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("meta_nbits", META_NBITS)
def test_weights_are_code_less_zero_times_scale(nbits, meta_nbits):
    for rows, group_size in ((1, 16), (7, 32), (64, 64), (131, 128)):
        matrix = random_matrix(rows, 2 * group_size, nbits, group_size, meta_nbits)
        torch.testing.assert_close(
            reference.dequantize(matrix, torch.float32), weights(matrix).float(), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("nbits", [8, 4, 2, 1])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_hqq_package_dequantizes_to_the_same_weights(nbits, group_size):
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    matrix = random_matrix(16, 2 * group_size, nbits, group_size)
    scale, zero = (meta.view(-1, 1) for meta in reference.scales_and_zeros(matrix))
    codes = unpack(matrix).view(-1, group_size)
    packing = quantizer.bit_to_packing[nbits]
    meta = {"nbits": nbits, "group_size": group_size, "shape": (16, 2 * group_size), "scale": scale, "zero": zero}
    meta |= {"axis": 1, "packing": packing, "view_as_float": False, "unpack_view_dtype": torch.uint8}
    meta |= {"quant_scale": False, "quant_zero": False, "compute_dtype": torch.float32}
    theirs = quantizer.dequantize(quantizer.pack[packing](codes), meta)
    assert torch.equal(reference.dequantize(matrix, torch.float32), theirs)


def test_weights_are_cast_once_at_the_end():
    matrix = random_matrix(40, 128)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(reference.dequantize(matrix, dtype), reference.dequantize(matrix, torch.float32).to(dtype))


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_products_are_those_of_the_weights(nbits, dtype):
    for matrix_rows, count in ((1, 1), (65, 3), (130, 70)):
        matrix, rows = random_matrix(matrix_rows, 128, nbits), random_rows(count, 128, dtype)
        expected = rows.double() @ weights(matrix).t()
        found = reference.linear(rows, matrix)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)


def test_transposed_products_are_those_of_the_weights():
    matrix, rows = random_matrix(70, 128, 3), random_rows(5, 70)
    expected = rows.double() @ weights(matrix)
    torch.testing.assert_close(reference.linear_transposed(rows, matrix), expected.float(), rtol=1e-4, atol=1e-4)


def test_autocast_does_not_round_the_products():
    matrix, rows = random_matrix(70, 128), random_rows(5, 128)
    plain = reference.linear(rows, matrix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.linear(rows, matrix), plain)


def test_threads_do_not_share_their_buffers():
    matrices = [random_matrix(200, 256, nbits, seed=nbits) for nbits in NBITS]
    rows = random_rows(2, 256)
    expected = [reference.linear(rows, matrix) for matrix in matrices]
    found = {}

    def work(number):
        found[number] = [reference.linear(rows, matrices[number]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(matrices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, products in enumerate(expected):
        assert all(torch.equal(again, products) for again in found[number])
