"""What holds for every test."""

import pytest
import torch
from hypothesis import settings

from interpreted import IS_INTERPRETED
from kernels.interpreter import mend

# How long an example takes says how busy the machine is. The suite is kept short by few; `tox -e newest` takes more.
settings.register_profile("quick", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("quick")

# Tests run side by side; kernels whose threads wait for each other's cores take up to ten times as long.
torch.set_num_threads(1)

if IS_INTERPRETED:
    mend()


def pytest_collection_modifyitems(items):
    """What takes a minute begins first, lest it is what one worker is left with while the others have ended."""
    items.sort(key=lambda item: item.path.name != "test_interpreted.py")


def pytest_runtest_setup(item):
    """Skip a test marked `gpu` where there is neither a GPU nor what stands in for it.

    A hook and no fixture: models are put on the device by fixtures of a module, which would come first.
    """
    if item.get_closest_marker("gpu") and not IS_INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
