"""The compiled kernels, one instruction set after another."""

import pytest

from transformers_moe_offload.kernels import native

from . import arm

OF_ARM = {"neon_dot": True, "neon": False}
"""Instruction sets of ARM -> whether the processor needs the dot product instructions."""


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", *OF_ARM, "portable"])
def instruction_set(request, monkeypatch):
    """Kernels of one instruction set are in use: those of ARM on an emulated processor, where this one is no ARM.

    Skipped where neither can be.
    """
    name = request.param
    if native.library() is None:
        pytest.skip(f"no compiled kernels: {native.native().missing}")
    runs_here = native.choose(native.library(), name) is not None
    if not runs_here and name in OF_ARM:
        if arm.missing():
            pytest.skip(arm.missing())
        found = arm.emulated(OF_ARM[name])
        monkeypatch.setattr(native, "native", lambda: found)
        assert native.choose(found.library, name) == name
    elif not runs_here:
        pytest.skip(f"this processor has no {name}")
    yield name
    native.choose(native.library())
