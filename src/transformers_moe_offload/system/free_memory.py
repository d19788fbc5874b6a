"""How many bytes an automatic budget may take."""

from __future__ import annotations

import sys

import psutil
import torch

from transformers_moe_offload.system.cgroup import memory_left

HOST_SHARE = 0.5
"""Share of the free RAM; the rest is left to activations, other programs, and the page cache that serves misses."""

DEVICE_RESERVE = 1 << 30
"""Bytes of free GPU memory left to activations, the KV cache and library workspaces."""

MAPPED_SHARE = 0.8
"""Share of the free RAM. Experts that take no more than this stay in the page cache once they have been read. Beyond it
mapped pages would be dropped and read again in the middle of a layer, where explicit reads are several times faster."""


def available_bytes(device: torch.device, held_bytes: int = 0) -> int:
    """Bytes that experts may take on a device when the user leaves it to us; `held_bytes` they have already."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # torch's freed memory, from a dropped cache or loading: CUDA counts it as taken
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, free + held_bytes - DEVICE_RESERVE)
    return int((free_ram() + held_bytes) * HOST_SHARE)


def page_cache_holds(nbytes: int) -> bool:
    """Whether there is RAM to spare for so many bytes of mapped files, on a system where we know how to map them."""
    return sys.platform == "linux" and nbytes <= free_ram() * MAPPED_SHARE


def free_ram() -> int:
    """Bytes of RAM that this process may still take: what is free on the machine, or what control groups leave it."""
    return int(min(psutil.virtual_memory().available, memory_left()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left. For host memory torch raises a plain `RuntimeError`
    (`c10/core/impl/alloc_cpu.cpp`, 2.13)."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
