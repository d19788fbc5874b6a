"""A small model to tune."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from zoo.build import build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random Qwen3-MoE with a few sparse layers of 8 experts, 2 for each token."""
    folder = tmp_path_factory.mktemp("qwen3-moe")
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text():
    return torch.randint(0, 96, (41,), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def load(checkpoint):
    """Loads it with a config, and keeps the configs in `load.configs`."""

    def load(config):
        load.configs.append(config)
        return AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)

    load.configs = []
    return load
