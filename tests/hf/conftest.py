"""Small checkpoints on disk, shared by the tests of loading and running."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from zoo.build import build

from .decoding import save

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random Qwen3-MoE in several shards: 3 sparse layers or more, 8 experts each, fp32."""
    folder = tmp_path_factory.mktemp("qwen3-moe")
    build("qwen3_moe").save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def own_checkpoint(tmp_path) -> Path:
    """Like `checkpoint`, for tests that damage it."""
    folder = tmp_path / "own"
    build("qwen3_moe").save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory) -> Path:
    """A random Qwen3-MoE that Triton's interpreter gets through."""
    folder = tmp_path_factory.mktemp("small")
    save("qwen3_moe", folder)
    return folder


@pytest.fixture(scope="session")
def packable_checkpoint(tmp_path_factory) -> Path:
    """The same with experts wide enough for groups of 16 weights."""
    folder = tmp_path_factory.mktemp("packable")
    save("qwen3_moe", folder, moe_intermediate_size=16)
    return folder


@pytest.fixture(scope="session")
def plain(checkpoint) -> PreTrainedModel:
    """The checkpoint as Transformers loads it. Do not change it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    return torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def expected(plain, token_ids) -> torch.Tensor:
    """Logits of the plain model."""
    with torch.no_grad():
        return plain(input_ids=token_ids).logits
