"""Reusable buffers, one set per thread: fresh pages cost more than the arithmetic done in them."""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor


class _Buffers(threading.local):
    """Per thread, the largest buffer requested so far for each purpose."""

    def __init__(self) -> None:
        self.largest: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_BUFFERS = _Buffers()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised buffer of this thread, valid until the thread requests one for the same purpose again."""
    key, size = (purpose, dtype, device), prod(shape)
    found = _BUFFERS.largest.get(key)
    if found is None or found.numel() < size:
        with torch.inference_mode(False):
            found = torch.empty(size, dtype=dtype, device=device)
        _BUFFERS.largest[key] = found
    return found[:size].view(shape)
