"""Host memory for zero-copy reads of an accelerator: page-locked, and read at the host's address.

torch's own page-locked memory comes in powers of two and is kept when it is freed, which is right for small buffers and
wrong for all experts of a model. So memory is allocated elsewhere, as much as is needed, and registered with CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from transformers_moe_offload.system.host_memory import new_area

PORTABLE_AND_MAPPED = 0x1 | 0x2
"""`cudaHostRegisterPortable | cudaHostRegisterMapped`: for all GPUs, and to be read by their kernels."""

SAME_ADDRESS = 91
"""`CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM` of CUDA's driver, which Linux has on every GPU that the
kernels are for and Windows may not have."""


class PageLock:
    """Keeps memory page-locked until `free`, or until the last reference to the lock is gone."""

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        """memory uint8 (nbytes,), from the beginning of a page. Raises `OSError` where it is not granted."""
        runtime = torch.cuda.cudart()
        error = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE_AND_MAPPED)
        if int(error):
            why = runtime.cudaGetErrorString(error)
            _forget_error(device)
            raise OSError(f"CUDA refused to page-lock {memory.nbytes:,} bytes: {why}")
        self.free: Callable[[], object] = weakref.finalize(self, _unlock, memory, device)
        """Unlock the memory, once the device has done all submitted work; a second call does nothing."""


def _forget_error(device: torch.device) -> None:
    """CUDA remembers its last error until it is asked for it. torch asks at its next kernel, which would seem to have
    failed."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def _unlock(memory: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # sync: host waits for device, which may be reading
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def pageable(nbytes: int) -> Tensor:
    """Zeros, uint8 (nbytes,), that begin at a page; with huge pages there are fewer to lock."""
    return torch.frombuffer(new_area(nbytes), dtype=torch.uint8)


def why_not_readable(device: torch.device) -> str | None:
    """Why a GPU cannot read registered memory at the host's address; None if it can."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        value, index = ctypes.c_int(), device.index if device.index is not None else torch.cuda.current_device()
        if driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(value), SAME_ADDRESS, index):
            return "CUDA's driver does not say whether the GPU can read page-locked memory at the host's address"
        return None if value.value else "the GPU cannot read page-locked memory at the host's address"
    return "CUDA's driver was not found"
