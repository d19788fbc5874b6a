"""What the rest of the package calls: the best kernels there are, the torch reference where there are none."""

import pytest
import torch

from transformers_moe_offload import kernels
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.kernels import native, reference

from .matrices import NBITS, random_matrix, random_rows


@pytest.fixture(params=["compiled", "not compiled"])
def build(request, monkeypatch):
    """With the compiled kernels, and as if they had not been built."""
    if request.param == "compiled" and native.library() is None:
        pytest.skip(f"no compiled kernels: {native.native().missing}")
    if request.param == "not compiled":
        monkeypatch.setattr(native, "native", lambda: native.Native(None, missing="not built"))
    return request.param


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_products_come_out_with_and_without_a_compiler(build, nbits, dtype):
    matrix, rows = random_matrix(33, 192, nbits), random_rows(3, 192, dtype)
    expected = rows.double() @ reference.dequantize(matrix, torch.float64).t()
    for activations in ("exact", "int8"):
        found = kernels.linear(rows, matrix, activations=activations)
        assert found.dtype == dtype
        assert (found - expected).norm() < 0.03 * expected.norm()


def test_what_is_there_is_said(build):
    said = kernels.available()["cpu"]
    assert (
        said in ("avx512_bf16", "avx512", "avx2", "neon_dot", "neon", "portable")
        if build == "compiled"
        else said == "not available: not built"
    )


def test_rows_have_the_gradient_of_the_weights(build):
    matrix = random_matrix(20, 128, 3)
    rows = random_rows(4, 128).requires_grad_()
    weight = reference.dequantize(matrix, torch.float32)
    gradient = random_rows(4, 20, seed=3)
    found = kernels.linear(rows, matrix)
    found.backward(gradient)
    torch.testing.assert_close(rows.grad, gradient @ weight, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(kernels.linear(rows, matrix), found)


def test_autocast_changes_nothing(build):
    matrix, rows = random_matrix(20, 128), random_rows(4, 128)
    plain = kernels.linear(rows, matrix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernels.linear(rows, matrix), plain)


def test_inference_mode_leaves_nothing_behind_that_training_trips_over(build):
    matrix, rows = random_matrix(20, 128), random_rows(4, 128)
    with torch.inference_mode():
        plain = kernels.linear(rows, matrix)
    trained = kernels.linear(rows.requires_grad_(), matrix)
    assert torch.equal(trained, plain)


def test_unknown_activations_are_refused(build):
    with pytest.raises(ConfigError, match=r"activations='int4' is not one of \['exact', 'int8'\]"):
        kernels.linear(random_rows(1, 64), random_matrix(8, 64), activations="int4")
