import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch

from formats.weights import KINDS, made, relative_error
from transformers_moe_offload.config.formats import GROUP_SIZES, NBITS, HqqFormat
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.formats.hqq import packing_of, quantize
from transformers_moe_offload.kernels.packed import unpack
from transformers_moe_offload.kernels.reference import dequantize, scales_and_zeros
from transformers_moe_offload.kernels.solver import Solver

LARGE = (128, 1024)


def restored(matrix):
    return dequantize(matrix, torch.float32)


def same_bytes(one, other):
    return one.packing == other.packing and all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts)


@functools.cache
def hqq_errors(kind, nbits, group_size):
    """Of a made matrix as the hqq package quantizes it: with scales and zeros as they are, and in its own 8 bits."""
    weight = made(kind, *LARGE)
    return tuple(relative_error(of_hqq(weight, nbits, group_size, in_8_bits=own), weight) for own in (False, True))


def of_hqq(weight, nbits, group_size, *, optimize=True, in_8_bits=False):
    """What the hqq package makes of a matrix; `in_8_bits` with scales and zeros as its `quant_scale` and `quant_zero`
    store them."""
    hqq = pytest.importorskip("hqq.core.quantize")
    settings = {"nbits": nbits, "group_size": group_size, "optimize": optimize, "round_zero": nbits == 4, "axis": 1}
    codes, meta = hqq.Quantizer.quantize(weight, **settings, device="cpu")
    if in_8_bits:
        config = hqq.hqq_base_quant_config(quant_zero=True, quant_scale=True, axis=1)
        for name in ("zero", "scale"):
            found, of_found = hqq.Quantizer.quantize(meta[name], **config[f"{name}_quant_params"], device="cpu")
            meta[name] = hqq.Quantizer.dequantize(found, of_found | {"compute_dtype": torch.float32})
    return hqq.Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})


def error_of(kind, solver, **format):
    weight = made(kind, *LARGE)
    return relative_error(restored(quantize(weight, HqqFormat(**format), solver=solver)), weight)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", NBITS)
def test_the_error_is_that_of_hqq_within_a_hundredth(nbits, group_size, solver):
    for kind in KINDS:
        theirs, _ = hqq_errors(kind, nbits, group_size)
        assert error_of(kind, solver, nbits=nbits, group_size=group_size, meta_nbits=16) < 1.01 * theirs, kind


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", NBITS)
def test_scales_and_zeros_in_8_bits_add_no_hundredth_unless_codes_have_8_too(nbits, group_size, solver):
    """hqq meets the two ends of a group exactly. With zeros in 8 bits no solver can, and of 8-bit codes' tiny
    error, two weights in a group of 16 are a part that shows."""
    for kind in KINDS:
        theirs, in_8_bits = hqq_errors(kind, nbits, group_size)
        ours = error_of(kind, solver, nbits=nbits, group_size=group_size, meta_nbits=8)
        allowed = {16: 1.13, 32: 1.08, 64: 1.06, 128: 1.05}[group_size] if nbits == 8 else 1.01
        assert ours < allowed * theirs, kind
        assert ours < (0.5 if nbits == 8 else 1.01) * in_8_bits, kind


@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_for_8_bit_codes_smaller_groups_are_a_better_use_of_bits_than_scales_in_16(group_size, solver):
    small = HqqFormat(nbits=8, group_size=group_size, meta_nbits=8)
    large = HqqFormat(nbits=8, group_size=2 * group_size, meta_nbits=16)
    assert small.bits_per_weight == pytest.approx(large.bits_per_weight, abs=0.04)
    for kind in KINDS:
        assert error_of(kind, solver, **asdict(small)) < error_of(kind, solver, **asdict(large))


@pytest.mark.parametrize("std", [1e-3, 1.0])
@pytest.mark.parametrize("nbits", [4, 2, 1])
def test_small_and_large_weights_come_out_as_well_as_with_hqq(nbits, std, solver):
    weight = made("gaussian", std=std)
    theirs = relative_error(of_hqq(weight, nbits, 64), weight)
    ours = relative_error(restored(quantize(weight, HqqFormat(nbits=nbits), solver=solver)), weight)
    assert ours < 1.01 * theirs


@pytest.mark.parametrize("nbits", NBITS)
def test_without_the_solver_weights_are_rounded_to_the_nearest_as_hqq_does(nbits, solver):
    weight = made("student")
    format = HqqFormat(nbits=nbits, meta_nbits=16, optimize=False)
    error = relative_error(restored(quantize(weight, format, solver=solver)), weight)
    assert error == pytest.approx(relative_error(of_hqq(weight, nbits, 64, optimize=False), weight), rel=0.01)


@pytest.mark.parametrize(("nbits", "meta_nbits"), list(itertools.product(NBITS, (16, 8))))
def test_no_other_code_is_nearer_under_the_stored_scale_and_zero(nbits, meta_nbits, solver):
    weight = made("outliers", 40, 64)
    matrix = quantize(weight, HqqFormat(nbits=nbits, group_size=16, meta_nbits=meta_nbits), solver=solver)
    scale, zero = (values.double().repeat_interleave(16, 1) for values in scales_and_zeros(matrix))
    chosen = ((unpack(matrix) - zero) * scale - weight).abs()
    for code in range(2**nbits):
        assert (chosen <= ((code - zero) * scale - weight).abs() + 1e-8).all()


@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (3, 16), (5, 48), (130, 16), (129, 80)])
@pytest.mark.parametrize("meta_nbits", [16, 8])
@pytest.mark.parametrize("nbits", [8, 3, 1])
def test_any_number_of_rows_gives_the_arrays_that_the_packing_names(nbits, meta_nbits, rows, cols, solver):
    weight = made("gaussian", rows, cols)
    format = HqqFormat(nbits=nbits, group_size=16, meta_nbits=meta_nbits)
    matrix = quantize(weight, format, solver=solver)
    assert matrix.packing == packing_of(rows, cols, format)
    assert [(part.name, part.shape, f"torch.{part.dtype}") for part in matrix.packing.parts] == [
        (name, tuple(part.shape), str(part.dtype)) for name, part in matrix.parts.items()
    ]
    assert all(part.is_contiguous() for part in matrix.parts.values())
    assert relative_error(restored(matrix), weight) < {8: 0.01, 3: 0.25, 1: 1.1}[nbits]


@pytest.mark.parametrize("meta_nbits", [16, 8])
def test_a_matrix_in_pieces_comes_out_as_in_one_piece(meta_nbits, solver):
    class InOnePiece(type(solver)):
        def chunk_of(self, groups):
            return groups.numel()

    weight = made("student", 520, 640)
    assert weight.numel() > 2 * solver.chunk_of(weight)
    format = HqqFormat(nbits=3, group_size=32, meta_nbits=meta_nbits)
    in_pieces, whole = quantize(weight, format, solver=solver), type(solver).__new__(InOnePiece)
    whole.__dict__ |= solver.__dict__
    assert same_bytes(in_pieces, quantize(weight, format, solver=whole))


def test_the_bytes_are_the_same_on_every_run_and_thread(solver):
    weight, format = made("gaussian", 256, 512, std=1.0), HqqFormat(nbits=2, group_size=32)
    first = quantize(weight, format, solver=solver)
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(lambda _: quantize(weight, format, solver=solver), range(4)))
    torch.set_num_threads(3)
    try:
        others.append(quantize(weight, format, solver=solver))
    finally:
        torch.set_num_threads(1)
    assert all(same_bytes(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_does_not_matter_only_the_values(dtype):
    weight = made("gaussian").bfloat16()
    weight = weight.half().bfloat16() if dtype == torch.float16 else weight
    assert same_bytes(quantize(weight.to(dtype), HqqFormat()), quantize(weight.float(), HqqFormat()))


def test_a_transposed_view_is_quantized_like_a_matrix_of_its_own():
    weight = made("gaussian", 128, 96)
    assert same_bytes(quantize(weight.t(), HqqFormat()), quantize(weight.t().contiguous(), HqqFormat()))


def test_parameters_are_quantized_without_a_graph_and_unchanged():
    weight = torch.nn.Parameter(made("gaussian"))
    before = weight.detach().clone()
    matrix = quantize(weight, HqqFormat())
    assert not any(part.requires_grad for part in matrix.parts.values())
    assert torch.equal(weight, before)


def test_a_group_size_that_does_not_divide_the_inputs_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="group_size=64 does not divide the 96 inputs of down_proj, 8 x 96"):
        quantize(made("gaussian", 8, 96), HqqFormat(group_size=64), name="down_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value, solver):
    weight = made("gaussian")
    weight[3, 77] = value
    with pytest.raises(CheckpointError, match=r"^down_proj of expert 7 .* 1 of \d+ "):
        quantize(weight, HqqFormat(), name="down_proj of expert 7", solver=solver)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_comes_as_near_as_a_cpu():
    weight = made("student")
    for nbits, meta_nbits in itertools.product(NBITS, (16, 8)):
        format = HqqFormat(nbits=nbits, meta_nbits=meta_nbits)
        on_gpu = quantize(weight.cuda(), format)
        assert all(part.is_cuda for part in on_gpu.parts.values())
        on_cpu = relative_error(restored(quantize(weight, format, solver=Solver())), weight)
        assert relative_error(restored(on_gpu).cpu(), weight) == pytest.approx(on_cpu, rel=0.01)
