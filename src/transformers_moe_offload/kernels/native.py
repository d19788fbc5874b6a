"""The compiled kernels: find and open the library built from `csrc`, or say why it cannot be used.

A plain C library, called through ctypes, which releases the GIL during every call. It is optional: without a compiler
the package installs without it, and torch does the same work.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ABI = 8
"""Must equal the number in `csrc/product.c`: a library with another number takes other arguments."""


class Native(NamedTuple):
    """The library and the name of the kernels in use, or why it is missing."""

    library: ctypes.CDLL | None
    kernels: str | None = None
    missing: str | None = None


def library() -> ctypes.CDLL | None:
    """The library this package was built with, if any."""
    return native().library


@functools.cache
def native() -> Native:
    """The library this package was built with, or why it is missing; the result is cached."""
    spec = importlib.util.find_spec("transformers_moe_offload.kernels._cpu")
    if spec is None or spec.origin is None:
        return Native(
            None, missing="they were not built; install a C compiler, then this package again from its sources"
        )
    return opened(Path(spec.origin))


def opened(path: Path, load: Callable[[str], Any] = ctypes.CDLL) -> Native:
    """Open a library with the best kernels this processor can run, or say why it cannot be used.

    `load` opens it; tests emulate other processors.
    """
    try:
        found = load(str(path))
        abi = found.moe_abi()
    except (OSError, AttributeError) as error:
        return Native(None, missing=f"{path} is not the library of this package: {error}")
    if abi != ABI:
        return Native(None, missing=f"{path} has interface {abi}, not {ABI}; install this package again")
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    found.moe_choose.restype = ctypes.c_char_p
    found.moe_choose.argtypes = (ctypes.c_char_p,)
    found.moe_set_parallel.restype = None
    found.moe_set_parallel.argtypes = (pointer, pointer)
    found.moe_linear.argtypes = (size, pointer, *[number] * 3)
    found.moe_read.restype = ctypes.c_uint64
    found.moe_read.argtypes = (pointer, size, number, number)
    found.moe_dense.argtypes = (pointer, pointer, number, size, size, pointer, number, size, pointer, number)
    found.moe_norm.argtypes = (
        pointer, number, size, size, pointer, number, ctypes.c_double, ctypes.c_double, number, pointer,
    )  # fmt: skip
    found.moe_route.argtypes = (
        pointer, pointer, number, *[size] * 4, *[number] * 3, pointer, pointer, number, pointer,
        pointer, ctypes.c_double, size, pointer, number,
    )  # fmt: skip
    found.moe_project.argtypes = (
        pointer, pointer, number, size, pointer, pointer, number, size, size, pointer, pointer, pointer, number,
    )  # fmt: skip
    found.moe_attend.argtypes = (pointer, pointer, number, size, pointer, pointer, pointer, size, pointer, number)
    found.moe_layer_bytes.restype = size
    found.moe_layer_bytes.argtypes = (pointer, size, size)
    found.moe_layer.restype = size
    inputs = (pointer, pointer, size, size, pointer, number, pointer, pointer, number, pointer)
    found.moe_layer.argtypes = (*inputs, ctypes.c_double, number)
    found.moe_layer_begin.restype = None
    found.moe_layer_begin.argtypes = inputs
    found.moe_layer_wanted.restype = size
    found.moe_layer_wanted.argtypes = (pointer, pointer)
    found.moe_layer_some.restype = None
    found.moe_layer_some.argtypes = (pointer, pointer, pointer, size, number)
    found.moe_layer_end.restype = None
    found.moe_layer_end.argtypes = (pointer, pointer, number)
    _share_threads(found)
    return Native(found, kernels=choose(found))


def choose(found: ctypes.CDLL, name: str | None = None) -> str | None:
    """Select the kernels `avx512_bf16`, `avx512`, `avx2`, `neon_dot`, `neon` or `portable`, by default the best.

    Returns the name, None if the processor cannot run them.
    """
    chosen = found.moe_choose(None if name is None else name.encode())
    return None if chosen is None else chosen.decode()


def _share_threads(found: ctypes.CDLL) -> None:
    """Let the library use the threads of torch's OpenMP runtime, which torch has loaded with global symbols."""
    if platform.system() != "Linux":
        return
    symbols = [getattr(ctypes.CDLL(None), name, None) for name in ("GOMP_parallel", "omp_get_max_threads")]
    found.moe_set_parallel(*(None if one is None else ctypes.cast(one, ctypes.c_void_p) for one in symbols))
