"""Every benchmark is found at the path that its page names, with all that it imports."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "benchmarks").glob("*/*.py"))
    if path.parent.name not in ("made", "results")
]
PEERS = ("llama_cpp",)
"""Packages that a benchmark compares with, and that only its own page has one install."""


def test_there_are_benchmarks_in_folders():
    assert len(MODULES) > 40


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_can_be_imported(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in PEERS:
            raise
        pytest.skip(f"it compares with {error.name}")
