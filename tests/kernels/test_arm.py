"""The kernels for 64-bit ARM: they compile without a warning, the best ones are chosen, and they agree with each other.

Most tests of kernels run with them through the fixture `instruction_set`. Here is what is about ARM alone.
"""

import pytest
import torch

from transformers_moe_offload.kernels import cpu, few_rows, native

from . import arm
from .matrices import META_NBITS, NBITS, random_matrix, random_rows

COMPILERS = ("clang", "clang for macOS", "gcc")


@pytest.fixture(params=[True, False], ids=["with dot products", "without"])
def found(request):
    """The library on an emulated processor with or without dot product instructions, with its best kernels."""
    if arm.missing():
        pytest.skip(arm.missing())
    found = arm.emulated(request.param)
    native.choose(found.library)
    return found


@pytest.mark.parametrize("name", COMPILERS)
def test_the_library_compiles_without_a_warning(name):
    if name not in arm.cross_compilers():
        pytest.skip(f"no {name} that compiles for ARM")
    assert arm.compiled(name).stat().st_size > 0


def test_the_best_kernels_are_chosen_by_what_the_processor_has(found, request):
    has_dot_product = "with dot products" in request.node.name
    assert found.kernels == ("neon_dot" if has_dot_product else "neon")
    runs = [name for name in ("neon_dot", "neon", "portable") if native.choose(found.library, name)]
    assert runs == ["neon_dot", "neon", "portable"][not has_dot_product :]
    assert native.choose(found.library, "avx2") is None


@pytest.mark.parametrize("nbits", NBITS)
def test_all_kernels_for_arm_agree(nbits, found, monkeypatch):
    """Exact products have the same bits with and without dot products; the rest is added up in another order."""
    monkeypatch.setattr(native, "native", lambda: found)
    for meta_nbits in META_NBITS:
        for matrix_rows, cols, count in ((45, 768, 7), (8, 128, 1)):
            matrix, rows = random_matrix(matrix_rows, cols, nbits, 64, meta_nbits), random_rows(count, cols)
            for activations in ("exact", "int8"):
                products = {}
                for name in ("neon_dot", "neon", "portable"):
                    if native.choose(found.library, name):
                        products[name] = cpu.linear_each(rows, [count], [matrix], activations)
                for other in products.values():
                    torch.testing.assert_close(other, products["portable"], rtol=1e-5, atol=1e-4)
                if activations == "exact":
                    assert torch.equal(products["neon"], products.get("neon_dot", products["neon"]))


def counted(found, product):
    """The instructions that the emulated processor executes for a product."""
    found.library.instructions = 0
    product()
    instructions, found.library.instructions = found.library.instructions, None
    return instructions


MOST_INSTRUCTIONS = {8: 0.65, 4: 0.6, 3: 0.95, 2: 0.65, 1: 0.7}
"""Bits -> for each weight, with dot products and rows rounded to int8: a tenth above the counts in docs/kernels.md."""


@pytest.mark.parametrize("nbits", NBITS)
def test_a_weight_costs_few_instructions(nbits, found, monkeypatch):
    """No processor is timed here; what can be counted is how much there is to do."""
    monkeypatch.setattr(native, "native", lambda: found)
    matrix, rows = random_matrix(128, 2048, nbits, 64, 8), random_rows(1, 2048)
    per_weight = {
        activations: counted(found, lambda: cpu.linear_each(rows, [1], [matrix], activations, 1)) / (128 * 2048)  # noqa: B023
        for activations in ("exact", "int8")
    }
    assert per_weight["exact"] < 2.4
    assert per_weight["int8"] < MOST_INSTRUCTIONS[nbits] * (1 if found.kernels == "neon_dot" else 1.4)


def test_a_bfloat16_weight_costs_less_than_one_instruction(found, monkeypatch):
    monkeypatch.setattr(native, "native", lambda: found)
    weight, rows = random_rows(128, 2048, torch.bfloat16), random_rows(1, 2048)
    assert counted(found, lambda: cpu.linear_each(rows, [1], [weight], "exact", 1)) < 128 * 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_and_linear_layers_are_near_float64(dtype, found, monkeypatch):
    monkeypatch.setattr(native, "native", lambda: found)
    epsilon = torch.finfo(dtype).eps
    for cols in (1, 7, 64, 515):
        rows, weight = random_rows(3, cols, dtype), random_rows(1, cols, dtype, seed=2)[0]
        exact = rows.double() * (rows.double().square().mean(1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + 1)
        norm = few_rows.normalised(rows, weight, few_rows.Norm(1e-5, shift=1.0))
        torch.testing.assert_close(norm.double(), exact, rtol=3 * epsilon, atol=3 * epsilon)
        matrix, bias = random_rows(21, cols, dtype, seed=3), random_rows(1, 21, dtype, seed=4)[0]
        exact = rows.double() @ matrix.double().T + bias.double()
        found_rows = few_rows.linear(rows, matrix, bias)
        torch.testing.assert_close(found_rows.double(), exact, rtol=2 * epsilon, atol=cols * epsilon)


@pytest.mark.parametrize("is_sigmoid", [False, True], ids=["softmax", "sigmoids"])
@pytest.mark.parametrize("num_experts", [5, 64])
def test_routers_choose_and_score_as_torch_does(num_experts, is_sigmoid, found, monkeypatch):
    monkeypatch.setattr(native, "native", lambda: found)
    rows, weight = random_rows(4, 96), random_rows(num_experts, 96, seed=2) / 10
    route = few_rows.Route(3, is_sigmoid, is_late=False, normalises=True, dtype=torch.float32)
    logits, scores, index = few_rows.routed(rows, weight, route)
    expected = rows @ weight.T
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    best, chosen = (expected.sigmoid() if is_sigmoid else expected.softmax(1)).topk(3)
    assert torch.equal(index, chosen)
    torch.testing.assert_close(scores, best / best.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
