import threading

import pytest
import torch

from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.solver import FusedSolver, Solver, solver_for

from . import arm

GROUP_SIZES = (16, 32, 64, 128)


@pytest.fixture(params=["torch", "fused", "fused, on ARM"])
def solver(request):
    if request.param == "torch":
        return Solver()
    if request.param == "fused":
        return fused()
    if arm.missing():
        pytest.skip(arm.missing())
    return FusedSolver(arm.emulated(True).library)


def fused():
    library = native.library()
    if library is None:
        pytest.skip("the kernels were not built")
    return FusedSolver(library)


def made(num_groups, size, std=0.02, seed=0):
    return std * torch.randn(num_groups, size, generator=torch.Generator().manual_seed(seed))


def start(groups, nbits):
    """Scale and zero that span each group's range, and the largest code."""
    low, high = groups.amin(1), groups.amax(1)
    scale = (high - low) / (2**nbits - 1)
    return scale, -low / scale, 2**nbits - 1


def share_alike(one, other):
    return float(((one - other).abs() < 1e-3).float().mean())


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_a_range_is_from_the_smallest_to_the_largest_weight(size, solver):
    groups = made(301, size)
    low, high = solver.ranges(groups)
    assert torch.equal(low, groups.amin(1))
    assert torch.equal(high, groups.amax(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, 16, 63])
def test_the_range_of_a_group_with_what_is_no_number_is_not_finite(place, value, solver):
    groups = made(3, 64)
    groups[1, place] = value
    low, high = solver.ranges(groups)
    assert (torch.isfinite(low) & torch.isfinite(high)).tolist() == [True, False, True]


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_no_other_code_is_nearer(nbits, solver):
    groups = made(50, 32)
    scale, zero, max_code = start(groups, nbits)
    codes = solver.nearest_codes(groups, 0.9 * scale, zero + 0.3, max_code)
    assert codes.dtype == torch.uint8
    distance = ((codes - zero[:, None] - 0.3) * 0.9 * scale[:, None] - groups).abs()
    for code in range(max_code + 1):
        assert (distance <= ((code - zero - 0.3) * 0.9 * scale)[:, None].sub(groups).abs() + 1e-7).all()


def test_codes_are_zero_where_the_scale_is(solver):
    codes = solver.nearest_codes(made(2, 16), torch.tensor([0.0, 0.01]), torch.tensor([3.0, 3.0]), 15)
    assert codes[0].tolist() == [0] * 16
    assert codes[1].any()


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_zeros_are_those_of_hqq(nbits, size, std, solver):
    """All but a few: where a weight lies between two codes, rounding decides about the rest of the way."""
    optimize = pytest.importorskip("hqq.core.optimize").optimize_weights_proximal_legacy
    groups = made(400, size, std)
    scale, zero, max_code = start(groups, nbits)
    _, _, theirs = optimize(groups, 1 / scale[:, None], zero[:, None].clone(), [0, max_code], 1)
    assert share_alike(solver.fit_zeros(groups, scale, zero, max_code), theirs[:, 0]) > 0.96


def test_large_residuals_are_shrunk_as_hqq_shrinks_them(solver):
    """Weights so large that many residuals count as outliers."""
    optimize = pytest.importorskip("hqq.core.optimize").optimize_weights_proximal_legacy
    groups = made(400, 64, std=3.0)
    scale, zero, max_code = start(groups, 2)
    fitted = solver.fit_zeros(groups, scale, zero, max_code)
    _, _, theirs = optimize(groups, 1 / scale[:, None], zero[:, None].clone(), [0, max_code], 1)
    assert (fitted - zero).abs().mean() > 0.01
    assert (fitted - theirs[:, 0]).abs().median() < 1e-5
    assert share_alike(fitted, theirs[:, 0]) > 0.96


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_a_zero_does_not_depend_on_the_groups_beside_it(std, solver):
    groups = made(300, 32, std)
    scale, zero, max_code = start(groups, 2)
    together = solver.fit_zeros(groups, scale, zero, max_code)
    apart = [solver.fit_zeros(groups[m : m + 7], scale[m : m + 7], zero[m : m + 7], max_code) for m in range(0, 300, 7)]
    assert torch.equal(together, torch.cat(apart))


def test_the_first_guess_is_left_as_it_is(solver):
    groups = made(10, 16)
    scale, zero, max_code = start(groups, 2)
    before = zero.clone()
    assert not torch.equal(solver.fit_zeros(groups, scale, zero, max_code), before)
    assert torch.equal(zero, before)


def test_two_threads_get_what_each_gets_alone(solver):
    results = {}
    problems = {seed: made(2000, 64, seed=seed) for seed in (1, 2)}

    def solve(seed):
        scale, zero, max_code = start(problems[seed], 4)
        results[seed] = [solver.fit_zeros(problems[seed], scale, zero, max_code) for _ in range(3)]

    threads = [threading.Thread(target=solve, args=(seed,)) for seed in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, groups in problems.items():
        scale, zero, max_code = start(groups, 4)
        alone = solver.fit_zeros(groups, scale, zero, max_code)
        assert all(torch.equal(result, alone) for result in results[seed])


def test_the_fused_solver_serves_matrices_on_the_cpu_where_it_was_built():
    expected = Solver if native.library() is None else FusedSolver
    assert type(solver_for(torch.zeros(2, 16))) is expected
    assert type(solver_for(torch.zeros(2, 16, device="meta"))) is Solver
