"""Tests of what runs on a GPU: on one where there is one, and anywhere in Triton's interpreter.

`test_interpreted.py` runs those that import from here with TRITON_INTERPRET=1, which has a CPU stand in for the GPU.
"""

import os

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICE = torch.device("cpu") if IS_INTERPRETED else torch.device("cuda", 0)
"""Of the tests marked `gpu`."""
