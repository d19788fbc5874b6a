"""Which kernels a GPU gets, and what becomes of one without Triton."""

import importlib.util

import pytest
import torch

from transformers_moe_offload import kernels
from transformers_moe_offload.kernels import gpu, reference
from transformers_moe_offload.kernels.grouped import Activation, PlacedMatrix
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
        found = gpu.linear_dequantized(rows, matrix, weights)
        torch.testing.assert_close(found, reference.linear(rows, matrix), rtol=1e-5, atol=1e-4)


def test_dequantizing_first_rounds_weights_to_the_type_of_the_rows():
    matrix, rows = random_matrix(21, 128), torch.eye(128, dtype=torch.bfloat16)
    assert torch.equal(gpu.linear_dequantized(rows, matrix), reference.dequantize(matrix, torch.bfloat16).t())


def test_what_there_is_for_a_gpu_is_said_whether_there_is_one_or_not():
    said = kernels.available()["gpu"]
    if gpu.missing() is None:
        assert said == "triton"
    else:
        assert said == f"not available: {gpu.missing()}"


@pytest.mark.parametrize(
    ("rows", "nbits", "is_interleaved", "can_activate"),
    [
        (6, None, False, True),
        (6, None, True, True),
        (7, None, False, False),
        (7, None, True, False),
        (6, 8, False, True),
        (6, 2, False, False),
        (8, 3, False, True),
        (8, 1, False, True),
        (12, 1, False, False),
        (6, 8, True, True),
        (10, 4, True, False),
        (6, 2, True, True),
    ],
)
def test_a_gate_is_activated_where_its_up_is_in_the_same_program(rows, nbits, is_interleaved, can_activate):
    packing = None if nbits is None else Packing(rows, 16, nbits, 16, 16)
    dtype = torch.float32 if nbits is None else None
    matrix = PlacedMatrix(rows, 16, {}, packing, dtype)
    assert matrix.can_activate(Activation("silu", has_gate=True, is_interleaved=is_interleaved)) == can_activate
    assert matrix.can_activate(Activation("silu"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("capability", "height"), [(80, 64), (90, 16)])
def test_every_kernel_compiles_for_a_gpu(capability, height, tmp_path, monkeypatch):
    """With loads of 16 bytes, also at addresses from a table, and in the shared memory that every GPU has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from transformers_moe_offload.kernels.triton import grouped, row, sizes, tile

    packing = Packing(1536, 2048, *((3, 64, 8) if capability == 80 else (4, 128, 16)))
    cut = sizes.row_sizes(packing)
    instructions, shared = assembly(row.row_kernel, "bfloat16", capability, sizes.formats(packing) | cut)
    assert bytes_loaded_at_once(instructions) == 16
    assert shared <= SHARED_MEMORY
    cut = sizes.tile_sizes(packing, torch.float32, 32)
    instructions, shared = assembly(tile.tile_kernel, "float32", capability, sizes.formats(packing) | cut)
    assert "mma" not in instructions
    assert shared <= SHARED_MEMORY
    for matrix, activation in matrices(packing):
        compiled_for = grouped.constants(matrix, activation)
        cut = sizes.row_sizes(packing) if matrix.packing else sizes.dense_row_sizes(2048, is_transposed=False)
        compiled = compiled_for | cut | {"has_weights": True}
        instructions, shared = assembly(grouped.grouped_row_kernel, "bfloat16", capability, compiled)
        assert bytes_loaded_at_once(instructions) == 16
        assert shared <= SHARED_MEMORY
        cut = sizes.tile_sizes(matrix.packing, torch.bfloat16, height)
        compiled = compiled_for | cut | {"is_sorted": False, "most_experts": 256}
        instructions, shared = assembly(grouped.grouped_tile_kernel, "bfloat16", capability, compiled)
        assert "mma" in instructions
        assert shared <= SHARED_MEMORY
    compiled = {"has_weights": True, "most_pairs": 128, "most_experts": 256, "step": 32}
    assembly(grouped.order_kernel, "bfloat16", capability, compiled)
    assembly(grouped.combine_kernel, "bfloat16", capability, {"width": 512})


def matrices(packing):
    places = {name: 0 for name in ("codes", "high", "scale", "zero", "scale_range", "zero_range", "weight", "bias")}
    bfloat16 = torch.bfloat16
    yield PlacedMatrix(1536, 2048, places, packing), Activation("silu", has_gate=True)
    yield PlacedMatrix(1536, 2048, places, dtype=bfloat16), Activation("gelu", has_gate=True)
    clamped = Activation("silu", has_gate=True, is_interleaved=True, limit=7.0, slope=1.702, shift=1.0)
    yield PlacedMatrix(1536, 2048, places, dtype=bfloat16, bias_dtype=bfloat16), clamped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 7])
def test_products_on_a_gpu_are_those_of_the_reference(dtype, count):
    matrix, rows = random_matrix(45, 256), random_rows(count, 256, dtype)
    expected = reference.linear(rows, matrix)
    for linear in (kernels.linear, gpu.linear_dequantized):
        found = linear(rows.cuda(), on_device(matrix))
        assert found.dtype == dtype
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)


def on_device(matrix):
    return PackedMatrix(matrix.packing, {name: part.cuda() for name, part in matrix.parts.items()})
