"""All that runs on a GPU runs in Triton's interpreter as well."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(900)
def test_all_tests_for_a_gpu_that_a_cpu_can_stand_in_for_pass_in_the_interpreter():
    """In one process of its own: whether kernels are interpreted is settled when Triton is imported."""
    files = [path for path in sorted(TESTS.glob("*/**/test_*.py")) if "from interpreted import" in path.read_text()]
    assert {path.parent.name for path in files} == {"cuda_graphs", "device_decode", "gpu", "hf", "kernels"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
