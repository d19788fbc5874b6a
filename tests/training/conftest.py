"""A small random checkpoint to train on."""

from pathlib import Path

import pytest
import torch

from zoo.build import build

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random Qwen3-MoE: 3 sparse layers or more, 8 experts each, fp32."""
    folder = tmp_path_factory.mktemp("qwen3-moe")
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    return torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
