"""Tests of what runs on a GPU: on one where there is one, and anywhere in Triton's interpreter.

Whether kernels are interpreted is settled when Triton is imported, so a file runs its tests marked `gpu` again in a
process of its own, where a CPU stands in for the GPU.
"""

import os
import subprocess
import sys

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICE = torch.device("cpu") if IS_INTERPRETED else torch.device("cuda", 0)
"""Of the tests marked `gpu`."""


def pass_in_the_interpreter(*files):
    """Run the tests marked `gpu` of these files; none may fail, and none be skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
