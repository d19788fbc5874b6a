"""How many bytes an automatic budget may take."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

HOST_SHARE = 0.5
"""Of the RAM that is free: the rest is left to activations, other programs, and the page cache that serves misses."""

DEVICE_RESERVE = 1 << 30
"""Bytes of free GPU memory left to activations, the KV cache and library workspaces."""

MAPPED_SHARE = 0.8
"""Of the RAM that is free: experts that take no more of it stay in the page cache once they have been read. Beyond that
mapped pages would be dropped and read again in the middle of a layer, where explicit reads are several times faster."""

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Bytes that experts may take on a device when the user leaves it to us."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, free - DEVICE_RESERVE)
    return int(_free_ram() * HOST_SHARE)


def page_cache_holds(nbytes: int) -> bool:
    """Whether there is RAM to spare for so many bytes of mapped files, on a system where we know how to map them."""
    return sys.platform == "linux" and nbytes <= _free_ram() * MAPPED_SHARE


def _free_ram() -> float:
    return min(float(psutil.virtual_memory().available), _cgroup_available())


def _cgroup_available() -> float:
    """Bytes left to this container (cgroup v2), page cache counted as free; infinity outside of one."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        usage = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    if not limit.isdigit():  # "max"
        return float("inf")
    return max(0, int(limit) - used + int(usage.get("inactive_file", 0)))
