"""The small trained model, offloaded, and a passage for it."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.passage import Passage, passage_for

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def model():
    """With slots for 40 % of its experts, into which they are copied."""
    loaded = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="40%", mmap=False))
    yield loaded.eval()
    loaded.moe_offload.close()


@pytest.fixture(scope="module")
def passage(model) -> Passage:
    return passage_for(model, str(TINY_MOE))
