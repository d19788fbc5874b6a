"""Memory of the host, seen as bytes."""

from __future__ import annotations

import numpy as np
from torch import Tensor

PAGE_BYTES = 4096
"""Size of a page: memory is mapped in multiples of it, and reads past the page cache have to begin at one on every disk
that we know."""


def host_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the CPU, for reading into."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy as many bytes as both have, with the interpreter's lock released, which assigning to a slice does not do."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
