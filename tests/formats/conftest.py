import pytest

from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.solver import FusedSolver, Solver


@pytest.fixture(params=["torch", "fused"])
def solver(request):
    """Each solver there is."""
    if request.param == "torch":
        return Solver()
    if native.library() is None:
        pytest.skip("the kernels were not built")
    return FusedSolver(native.library())
