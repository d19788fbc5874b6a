"""Groups that hqq's own rule would spoil: they come out as near as scales and zeros in float16 allow."""

import pytest
import torch

from formats.weights import made, relative_error
from transformers_moe_offload.config.formats import NBITS, HqqFormat
from transformers_moe_offload.formats.hqq import quantize
from transformers_moe_offload.kernels.reference import dequantize

META_NBITS = [16, 8]


def error(weight, solver, **options):
    return relative_error(dequantize(quantize(weight, HqqFormat(**options), solver=solver), torch.float32), weight)


@pytest.mark.parametrize("meta_nbits", META_NBITS)
@pytest.mark.parametrize("nbits", NBITS)
def test_zeros_stay_zeros_also_beside_other_weights(nbits, meta_nbits, solver):
    weight = made("gaussian", 24, 256)
    weight[3] = 0
    weight[:, 128:] = 0
    matrix = quantize(weight, HqqFormat(nbits=nbits, group_size=32, meta_nbits=meta_nbits), solver=solver)
    assert not dequantize(matrix, torch.float32)[weight == 0].any()


@pytest.mark.parametrize("meta_nbits", META_NBITS)
@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 0.375, 2.0**-20])
def test_weights_that_are_all_one_float16_are_exact(value, nbits, meta_nbits, solver):
    weight = torch.full((8, 256), value)
    matrix = quantize(weight, HqqFormat(nbits=nbits, group_size=32, meta_nbits=meta_nbits), solver=solver)
    assert torch.equal(dequantize(matrix, torch.float32), weight)


@pytest.mark.parametrize("meta_nbits", META_NBITS)
@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("value", [-0.3, 3.14159e-4, 12345.678, 3e6, -1e9])
def test_weights_that_are_all_equal_are_off_by_no_more_than_float16(value, nbits, meta_nbits, solver):
    assert error(torch.full((8, 256), value), solver, nbits=nbits, meta_nbits=meta_nbits) < 2**-11


@pytest.mark.parametrize("meta_nbits", META_NBITS)
@pytest.mark.parametrize("nbits", NBITS)
def test_weights_that_are_nearly_equal_are_off_by_no_more_than_they_differ(nbits, meta_nbits, solver):
    assert error(1 + made("gaussian", std=1e-4), solver, nbits=nbits, meta_nbits=meta_nbits) < 2e-4


@pytest.mark.parametrize("meta_nbits", META_NBITS)
@pytest.mark.parametrize("nbits", NBITS)
def test_weights_of_one_sign_use_all_codes(nbits, meta_nbits, solver):
    """Rounding to steps of 1 / (2 ** nbits - 1) is off by their length over the root of 12; the weights are 1.5."""
    weight = 1 + torch.rand(64, 256, generator=torch.Generator().manual_seed(0))
    of_rounding = 1 / (2**nbits - 1) / 12**0.5 / 1.5
    assert error(weight, solver, nbits=nbits, meta_nbits=meta_nbits) < 1.1 * of_rounding
    assert error(-weight, solver, nbits=nbits, meta_nbits=meta_nbits) < 1.1 * of_rounding


@pytest.mark.parametrize("meta_nbits", META_NBITS)
@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("odd", [0.0, 1.0, -0.5, 1e-3])
def test_an_odd_group_does_not_spoil_the_block_it_shares_steps_with(odd, nbits, meta_nbits, solver):
    weight = made("gaussian", 32, 256)
    options = {"nbits": nbits, "group_size": 16, "meta_nbits": meta_nbits}
    undisturbed = error(weight, solver, **options)
    weight[5, 32:48] = odd
    restored = dequantize(quantize(weight, HqqFormat(**options), solver=solver), torch.float32)
    others = torch.ones_like(weight, dtype=torch.bool)
    others[5, 32:48] = False
    assert relative_error(restored[others], weight[others]) < undisturbed * (1.2 if nbits == 8 else 1.02)
    assert (restored[~others] - odd).abs().max() <= 0.02 * abs(odd)


@pytest.mark.parametrize("meta_nbits", META_NBITS)
def test_tiny_weights_are_met_as_nearly_as_the_smallest_scale_allows(meta_nbits, solver):
    weight = made("gaussian", std=1e-6)
    restored = dequantize(quantize(weight, HqqFormat(nbits=8, meta_nbits=meta_nbits), solver=solver), torch.float32)
    assert (restored - weight).abs().max() <= 2**-24


@pytest.mark.parametrize("std", [1e-9, 1e-30, 1e-41])
@pytest.mark.parametrize("meta_nbits", META_NBITS)
def test_weights_below_any_scale_become_no_larger_than_one(meta_nbits, std, solver):
    weight = made("gaussian", std=std)
    restored = dequantize(quantize(weight, HqqFormat(meta_nbits=meta_nbits), solver=solver), torch.float32)
    assert restored.abs().max() <= 2**-24


@pytest.mark.parametrize("meta_nbits", META_NBITS)
def test_weights_beyond_float16_are_met_like_others(meta_nbits, solver):
    weight = made("gaussian", std=1e5)
    assert error(weight, solver, nbits=8, meta_nbits=meta_nbits) < 0.007
    assert error(weight, solver, nbits=4, meta_nbits=meta_nbits) < 0.1


@pytest.mark.parametrize("std", [1e9, 1e30, 1e38])
@pytest.mark.parametrize("meta_nbits", META_NBITS)
def test_weights_beyond_every_scale_stay_numbers_of_their_sign(meta_nbits, std, solver):
    weight = made("gaussian", std=std).clamp(-3e38, 3e38)
    restored = dequantize(quantize(weight, HqqFormat(meta_nbits=meta_nbits), solver=solver), torch.float32)
    assert torch.isfinite(restored).all()
    far = weight.abs() > 1e6
    assert torch.equal(restored[far].sign(), weight[far].sign())
    assert restored[far].abs().min() > 4e5


@pytest.mark.parametrize("meta_nbits", META_NBITS)
def test_groups_of_very_different_size_share_a_block(meta_nbits, solver):
    weight = made("gaussian", 32, 256)
    weight[:, :128] *= 1e-4
    restored = dequantize(quantize(weight, HqqFormat(meta_nbits=meta_nbits), solver=solver), torch.float32)
    assert relative_error(restored, weight) < 0.1
    assert (restored - weight)[:, :128].abs().max() < 0.5 * 0.02 / 15
