"""Which kernels a GPU gets, and what becomes of one without Triton."""

import importlib.util

import pytest
import torch

from transformers_moe_offload import kernels
from transformers_moe_offload.kernels import dequantized, gpu, reference
from transformers_moe_offload.kernels.packed import PackedMatrix, Packing

from .compiled import assembly, bytes_loaded_at_once
from .matrices import GROUP_SIZES, NBITS, random_matrix, random_rows

SHARED_MEMORY = 99 << 10
"""Bytes that a program can have on GPUs of compute capability 8.6 and 8.9, the least of those from 8.0 on."""


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", NBITS)
def test_dequantizing_first_gives_what_the_reference_gives(nbits, group_size):
    for meta_nbits, matrix_rows, weights in [(8, 45, 7 * 3 * group_size), (16, 3, 1), (8, 1, 1 << 22)]:
        matrix = random_matrix(matrix_rows, 3 * group_size, nbits, group_size, meta_nbits)
        rows = random_rows(5, 3 * group_size)
        found = dequantized.linear(rows, matrix, weights)
        torch.testing.assert_close(found, reference.linear(rows, matrix), rtol=1e-5, atol=1e-4)


def test_dequantizing_first_rounds_weights_to_the_type_of_the_rows():
    matrix, rows = random_matrix(21, 128), torch.eye(128, dtype=torch.bfloat16)
    assert torch.equal(dequantized.linear(rows, matrix), reference.dequantize(matrix, torch.bfloat16).t())


def test_what_there_is_for_a_gpu_is_said_whether_there_is_one_or_not():
    said = kernels.available()["gpu"]
    if gpu.missing() is None:
        assert said == "triton"
    else:
        assert said == f"not there: {gpu.missing()}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_a_gpu(capability, tmp_path, monkeypatch):
    """With loads of 16 bytes, also at addresses from a table, and in the shared memory that every GPU has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from transformers_moe_offload.kernels.triton import launch

    packing = Packing(1536, 2048, *((3, 64, 8) if capability == 80 else (4, 128, 16)))
    for kernel, sizes in [
        (launch.row_kernel, launch.row_sizes(packing)),
        (launch.grouped_row_kernel, launch.row_sizes(packing) | {"experts": 256}),
    ]:
        instructions, shared = assembly(kernel, packing, sizes, "bfloat16", capability)
        assert bytes_loaded_at_once(instructions) == 16
        assert shared <= SHARED_MEMORY
    for kernel, dtype, count in [
        (launch.tile_kernel, "float32", 32),
        (launch.grouped_tile_kernel, "bfloat16", 64),
    ]:
        sizes = launch.tile_sizes(packing, getattr(torch, dtype), count) | {"experts": 256}
        sizes = {name: size for name, size in sizes.items() if name in (*kernel.arg_names, "num_warps")}
        instructions, shared = assembly(kernel, packing, sizes, dtype, capability)
        assert ("mma" in instructions) == (dtype == "bfloat16")
        assert shared <= SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 7])
def test_products_on_a_gpu_are_those_of_the_reference(dtype, count):
    matrix, rows = random_matrix(45, 256), random_rows(count, 256, dtype)
    expected = reference.linear(rows, matrix)
    for linear in (kernels.linear, dequantized.linear):
        found = linear(rows.cuda(), on_device(matrix))
        assert found.dtype == dtype
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)


def on_device(matrix):
    return PackedMatrix(matrix.packing, {name: part.cuda() for name, part in matrix.parts.items()})
