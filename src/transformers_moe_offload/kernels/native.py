"""The compiled kernels: where the library is that `csrc` was built into, and why there is none.

A plain C library, called through ctypes, which gives up the interpreter's lock for every call. It is optional: without
a compiler the package installs without it, and everything it does is done in torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
from pathlib import Path
from typing import NamedTuple

ABI = 3
"""As in `csrc/product.c`: a library with another number takes other arguments."""


class Native(NamedTuple):
    """The library and which of its kernels are used, or why there is none."""

    library: ctypes.CDLL | None
    kernels: str | None = None
    missing: str | None = None


def library() -> ctypes.CDLL | None:
    """The library this package was built with, if any."""
    return native().library


@functools.cache
def native() -> Native:
    """The library this package was built with, looked for once."""
    spec = importlib.util.find_spec("transformers_moe_offload.kernels._cpu")
    if spec is None or spec.origin is None:
        return Native(
            None, missing="they were not built; install a C compiler, then this package again from its sources"
        )
    return opened(Path(spec.origin))


def opened(path: Path) -> Native:
    """A library, with the best kernels this processor can run, or why it cannot be used."""
    try:
        found = ctypes.CDLL(str(path))
        abi = found.moe_abi()
    except (OSError, AttributeError) as error:
        return Native(None, missing=f"{path} is not the library of this package: {error}")
    if abi != ABI:
        return Native(None, missing=f"{path} has interface {abi}, not {ABI}; install this package again")
    _declare(found)
    _share_threads(found)
    return Native(found, kernels=choose(found))


def choose(found: ctypes.CDLL, name: str | None = None) -> str | None:
    """Use the kernels `avx512`, `avx2` or `portable`, or the best there are; their name, None if they cannot run."""
    chosen = found.moe_choose(None if name is None else name.encode())
    return None if chosen is None else chosen.decode()


def _declare(found: ctypes.CDLL) -> None:
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    found.moe_choose.restype = ctypes.c_char_p
    found.moe_choose.argtypes = (ctypes.c_char_p,)
    found.moe_set_parallel.restype = None
    found.moe_set_parallel.argtypes = (pointer,)
    found.moe_linear.argtypes = (size, pointer, *[number] * 3)


def _share_threads(found: ctypes.CDLL) -> None:
    """Let the library work on the threads of torch's own OpenMP runtime, which torch has put among global symbols."""
    if platform.system() != "Linux":
        return
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    found.moe_set_parallel(ctypes.cast(parallel, ctypes.c_void_p) if parallel is not None else None)
