"""The small trained dense model, and texts of its three domains."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from transformers_moe_offload.builder.recipe import Origin
from transformers_moe_offload.builder.sources import open_source

HERE = Path(__file__).parent
TINY_DENSE = HERE.parents[1] / "examples" / "models" / "tiny-dense"


@pytest.fixture(scope="session")
def tiny_dense():
    return TINY_DENSE


@pytest.fixture(scope="session")
def base():
    return open_source(Origin(model=str(TINY_DENSE)))


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_DENSE)


@pytest.fixture(scope="session")
def ffn():
    """Blocks of the lower half of the layers: those above are not run then, which is quicker."""
    return {layer: f"model.layers.{layer}.mlp" for layer in range(3)}


@pytest.fixture(scope="session")
def domains():
    """By domain: some thousand characters to calibrate with, and as many to look at afterwards."""
    names = ("prose", "python", "c")
    return {name: (HERE / "domains" / f"{name}.txt").read_text(encoding="utf-8") for name in names}
