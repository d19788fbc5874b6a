"""The compiled library is found, or it is said why not; the package installs without a compiler."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from forked import forget_the_package, in_a_child
from transformers_moe_offload import kernels
from transformers_moe_offload.kernels import native

from .matrices import random_matrix, random_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compiled(tmp_path):
    """Compile a little library from C."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")

    def compiled(source: str) -> Path:
        library = tmp_path / "library.so"
        command = [compiler, "-x", "c", "-", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run(command, input=source, text=True, check=True)
        return library

    return compiled


def falls_back(found, monkeypatch) -> bool:
    """Whether products are computed without that library."""
    monkeypatch.setattr(native, "native", lambda: found)
    matrix, rows = random_matrix(8, 64), random_rows(2, 64)
    products = kernels.linear(rows, matrix)
    assert kernels.available()["cpu"] == f"not available: {found.missing}"
    return torch.equal(products, kernels.reference.linear(rows, matrix))


def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch):
    found = native.opened(tmp_path / "missing.so")
    assert found.library is None
    assert "missing.so is not the library of this package" in found.missing
    assert falls_back(found, monkeypatch)


def test_a_file_that_is_no_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "text.so").write_text("text")
    assert falls_back(native.opened(tmp_path / "text.so"), monkeypatch)


def test_another_library_is_refused(compiled, monkeypatch):
    found = native.opened(compiled("int something(void) { return 1; }"))
    assert "is not the library of this package" in found.missing
    assert falls_back(found, monkeypatch)


def test_a_library_of_an_older_interface_is_refused_with_both_numbers(compiled, monkeypatch):
    found = native.opened(compiled("int moe_abi(void) { return 0; }"))
    assert f"has interface 0, not {native.ABI}; install this package again" in found.missing
    assert falls_back(found, monkeypatch)


def test_the_best_kernels_are_in_use():
    if native.library() is None:
        pytest.skip("no compiled kernels")
    names = ("avx512_bf16", "avx512", "avx2", "neon_dot", "neon", "portable")
    runs = [name for name in names if native.choose(native.library(), name)]
    assert native.choose(native.library()) == runs[0] == native.native().kernels


def test_the_package_builds_and_works_without_a_compiler(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    environment = os.environ | {"CC": "false", "CXX": "false"}
    subprocess.run([sys.executable, "-c", build], cwd=source, env=environment, check=True, capture_output=True)
    [wheel] = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert not [name for name in names if name.endswith(".so")]
    assert "transformers_moe_offload/py.typed" in names

    def imported():
        sys.path.insert(0, str(tmp_path / "installed"))
        forget_the_package()
        found = importlib.import_module("transformers_moe_offload.kernels")
        products = found.linear(random_rows(2, 64), random_matrix(8, 64))
        return found.__file__, found.available()["cpu"], tuple(products.shape)

    place, said, shape = in_a_child(imported)
    assert place.startswith(str(tmp_path / "installed"))
    assert "not available: they were not built; install a C compiler" in said
    assert shape == (2, 8)
