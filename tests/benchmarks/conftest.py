"""Import the scripts of `benchmarks/`, which find each other because they lie in one folder."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def script():
    """Import a script by name; its neighbours do not stay importable for other tests, nor progress bars off."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module
    logging.enable_progress_bar()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


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
