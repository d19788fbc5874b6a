"""Host memory that an accelerator reads where it is: page-locked, and at the address that the host knows it by.

torch's own page-locked memory comes in powers of two and is kept when it is freed, which is right for small buffers and
wrong for all experts of a model. So memory is taken from the system as it is needed, and then registered with CUDA.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

PORTABLE_AND_MAPPED = 0x1 | 0x2
"""`cudaHostRegisterPortable | cudaHostRegisterMapped`: for all GPUs, and to be read by their kernels."""

SAME_ADDRESS = 91
"""`CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM` of CUDA's driver, which Linux has on every GPU that the
kernels are for and Windows may not have."""


class PageLockedBlock:
    """Some bytes of page-locked memory. They are given back by `free`, or when nobody refers to the block any more."""

    def __init__(self, nbytes: int) -> None:
        """Raises `OSError` where the system, or CUDA, does not grant them."""
        self.memory: Tensor = pageable(nbytes)
        """uint8 (nbytes,)."""
        runtime = torch.cuda.cudart()
        address = self.memory.data_ptr()
        error = runtime.cudaHostRegister(address, nbytes, PORTABLE_AND_MAPPED)
        if int(error):
            raise OSError(f"CUDA would not lock {nbytes:,} bytes in memory: {runtime.cudaGetErrorString(error)}")
        self.free: Callable[[], object] = weakref.finalize(self, runtime.cudaHostUnregister, address)
        """Give the memory back; the device must not be reading it any more."""


class PageableBlock:
    """The same of ordinary memory, for a CPU."""

    def __init__(self, nbytes: int) -> None:
        self.memory: Tensor = pageable(nbytes)

    def free(self) -> None:
        """It goes with whoever refers to it last."""


def pageable(nbytes: int) -> Tensor:
    """Zeros, uint8 (nbytes,), that begin at a page; the system takes no memory for what is not written to."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def why_not_readable(device: torch.device) -> str | None:
    """Why a GPU cannot read registered memory at the host's address; None if it can."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        value, index = ctypes.c_int(), device.index if device.index is not None else torch.cuda.current_device()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), SAME_ADDRESS, index):
            return "CUDA's driver does not say whether the GPU can read page-locked memory at the host's address"
        return None if value.value else "the GPU cannot read page-locked memory at the host's address"
    return "CUDA's driver was not found"
