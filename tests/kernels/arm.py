"""The compiled kernels for 64-bit ARM on another processor: compiled by a cross compiler, run by an emulator."""

import ast
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers_moe_offload.kernels import native

from .emulator import Emulated

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src/transformers_moe_offload/kernels/csrc"
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def cross_compilers():
    """Name -> command of each compiler for ARM that is here: clang of the package ziglang, and Debian's gcc."""
    found = {}
    if importlib.util.find_spec("ziglang") is not None:
        found["clang"] = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu"]
        found["clang for macOS"] = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-macos"]
    if shutil.which("aarch64-linux-gnu-gcc"):
        found["gcc"] = ["aarch64-linux-gnu-gcc"]
    return found


def flags():
    """Those that setup.py compiles with."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    [found] = [
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "extra_compile_args"
    ]
    return found


@functools.cache
def compiled(name):
    """The library of the package, by one of these compilers, every warning being an error.

    Compiled once, whichever of several processes needs it first, and again if a source or the compiler is another.
    """
    command = cross_compilers()[name]
    content = [path.read_bytes() for path in (*sorted(SOURCES.iterdir()), ROOT / "setup.py", Path(__file__))]
    version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(b"".join([*content, version])).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"moe-offload-arm-{os.getuid()}-{digest}"
    library = folder / f"{name}.so"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished, sources = folder / f"{name}.unfinished", sorted(map(str, SOURCES.glob("*.c")))
            command += [*flags(), *WARNINGS, "-fPIC", "-shared", *sources, "-lm"]
            with tempfile.TemporaryDirectory() as cache:
                environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
                done = subprocess.run(
                    [*command, "-o", str(unfinished)], capture_output=True, text=True, env=environment
                )
            assert done.returncode == 0, done.stderr
            unfinished.rename(library)
    return library


def missing():
    """Why the kernels for ARM cannot be run here, or None."""
    if platform.system() != "Linux":
        return "the emulator reads memory maps of Linux"
    if importlib.util.find_spec("unicorn") is None:
        return "the package unicorn, which emulates ARM processors, is not installed"
    if not cross_compilers():
        return "neither the package ziglang nor aarch64-linux-gnu-gcc is installed, so nothing compiles for ARM"
    return None


@functools.cache
def emulated(has_dot_product):
    """As `native.native` gives it, the library on an emulated processor with or without dot product instructions."""
    [name, *_] = [name for name in ("clang", "gcc") if name in cross_compilers()]
    return native.opened(compiled(name), functools.partial(Emulated, has_dot_product=has_dot_product))
