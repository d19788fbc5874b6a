"""Buffers that a thread uses again and again: fresh pages cost more than the arithmetic done in them."""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor


class _Buffers(threading.local):
    """Of each thread, the largest buffer it has needed for each purpose."""

    def __init__(self) -> None:
        self.largest: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_BUFFERS = _Buffers()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer of this thread, with anything in it; it stays as it is until the thread asks for the same purpose."""
    key, size = (purpose, dtype, device), prod(shape)
    found = _BUFFERS.largest.get(key)
    if found is None or found.numel() < size:
        with torch.inference_mode(False):
            found = torch.empty(size, dtype=dtype, device=device)
        _BUFFERS.largest[key] = found
    return found[:size].view(shape)
