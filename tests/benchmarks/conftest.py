"""Import the modules of `benchmarks/` by their place there: `script("decode.overhead")`."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    """Import a module; the checkout does not stay on the path for other tests, nor progress bars off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield lambda name: importlib.import_module(f"benchmarks.{name}")
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def tiny_moe() -> str:
    return str(ROOT / "examples" / "models" / "tiny-moe")


@pytest.fixture(scope="module")
def one_thread():
    """Matrices this small are computed faster by one thread than two threads take to meet."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A `texts.json` made of a licence, which will not change."""
    licence = (ROOT / "LICENSE").read_text()
    held_out, trained = licence[: len(licence) // 2], licence[len(licence) // 2 :]
    found = {
        domain: {"held_out": [held_out[start:]], "train": [trained[start:]]}
        for domain, start in (("prose", 0), ("python", 1500), ("c", 3000))
    }
    path = tmp_path_factory.mktemp("texts") / "texts.json"
    path.write_text(json.dumps(found))
    return path
