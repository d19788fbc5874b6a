"""How many bytes an automatic budget may take, under the limits of control groups; giving freed memory back."""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from transformers_moe_offload.system.control_groups import MEMBERSHIP, ROOT, groups

HOST_SHARE = 0.5
"""Share of the free RAM; the rest is left to activations, other programs, and the page cache that serves misses."""

DEVICE_RESERVE = 1 << 30
"""Bytes of free GPU memory left to activations, the KV cache and library workspaces."""

MAPPED_SHARE = 0.8
"""Share of the free RAM. Experts that take no more than this stay in the page cache once they have been read. Beyond it
mapped pages would be dropped and read again in the middle of a layer, where explicit reads are several times faster."""


class _Version(NamedTuple):
    """What the files of a hierarchy are called."""

    limit: str
    used: str
    droppable: str
    """The line of `memory.stat` with the page cache that was not used lately, by all groups below."""


# Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of Linux 6.1.
_V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version("memory.max", "memory.current", "inactive_file")


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


def trim() -> None:
    """Release freed memory where the allocator has `malloc_trim`; elsewhere do nothing.

    glibc keeps pieces below 32 MiB, and a pass through many layers leaves some 65 MB of them a layer (a 2048-wide Llama
    in float32, glibc 2.36, 2026-11).
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if release is not None:
        release(0)


def memory_left(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Bytes that this process may still take, page cache that can be dropped counted as free; infinity without a limit.

    The tightest group counts, of this process's own and of those around it.
    """
    found = groups("memory", root, membership)
    return min((_left(group, _V1 if version == 1 else _V2) for group, version in found), default=math.inf)


def _left(group: Path, version: _Version) -> float:
    """Bytes that one group leaves; infinity if it has no limit, or no files that tell one."""
    try:
        limit = (group / version.limit).read_text().strip()
        used = int((group / version.used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        droppable = int(stat.get(version.droppable, 0))
    except (OSError, ValueError):
        return math.inf
    if not limit.isdigit():  # "max"
        return math.inf
    return max(0, int(limit) - used + droppable)
