"""A small model whose routing can be watched, plain and offloaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from recorded import generation, recording
from transformers_moe_offload import OffloadConfig, routing
from zoo.build import build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random Qwen3-MoE with a few sparse layers of 8 experts, 2 for each token."""
    folder = tmp_path_factory.mktemp("qwen3-moe")
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture
def plain(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")


@pytest.fixture
def offloaded(checkpoint):
    config = OffloadConfig(cache_budget="50%", arithmetic="exact", prefetch={"lookahead": 1})
    return AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)


@pytest.fixture(scope="session")
def token_ids():
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def strange(plain):
    """A generation whose experts were drawn by lot, so that no router would choose them by itself."""
    with routing.set_routing(plain, "random", seed=5):
        return recording(plain, lambda: generation(plain))
