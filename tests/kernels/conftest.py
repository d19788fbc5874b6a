"""The compiled kernels, one instruction set after another."""

import pytest

from transformers_moe_offload.kernels import native


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "portable"])
def instruction_set(request):
    """Kernels of one instruction set are in use; skipped where this machine cannot run them."""
    library = native.library()
    if library is None:
        pytest.skip(f"no compiled kernels: {native.native().missing}")
    if native.choose(library, request.param) is None:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.choose(library)
