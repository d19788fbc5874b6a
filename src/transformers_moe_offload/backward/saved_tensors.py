"""Lend experts' weights to a forward that is not ours, and that autograd records, without autograd keeping them.

What such a forward does with a weight is unknown, but the tensors that autograd saves go through hooks. A saved tensor
that lies inside a lent weight is replaced by a note of the expert, the field and the place in it. When the backward
pass comes to it, the weight is fetched again. So the graph is the one that a plain model has, and so are its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_moe_offload.compute.deltas import NOTHING, Adaptation

Fetch = Callable[[str, int], Tensor]
"""One field of one expert: (field name, expert) -> its tensor, valid until another expert is fetched."""


@dataclass(frozen=True)
class _Note:
    """A part of a weight."""

    name: str
    expert: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Elements between the beginning of the weight and that of the part."""


class Lending:
    """Lends weights during one forward, and recognises them among the tensors that autograd saves."""

    def __init__(self, fetch: Fetch, again: Fetch, adaptation: Adaptation = NOTHING) -> None:
        """`again` is `fetch` for the backward pass; what it returns is in memory of its own."""
        self._fetch = fetch
        self._again = again
        self._adaptation = adaptation
        self._lent: dict[str, Tensor] = {}
        self._expert: int | None = None

    def __call__(self, name: str, expert: int) -> Tensor:
        """A field of an expert; valid until one of another expert is asked for."""
        if expert in self._adaptation.own:
            return self._adaptation.own[expert][name]
        if expert != self._expert:
            self._lent, self._expert = {}, expert
        weight = self._adaptation.weight(expert, name, self._fetch(name, expert))
        # Autocast would make a copy to multiply with, and autograd would keep that.
        weight = weight.to(_autocast_dtype(weight))
        self._lent[name] = weight
        return weight

    def recorded(self) -> AbstractContextManager[object]:
        """While this is open, autograd saves notes in place of lent weights."""
        return torch.autograd.graph.saved_tensors_hooks(self._noted, self._had_again)

    def end(self) -> None:
        """The forward is over: lent weights are not valid any more."""
        self._lent, self._expert = {}, None

    def _noted(self, tensor: Tensor) -> Tensor | _Note:
        for name, weight in self._lent.items():
            start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
            if start <= tensor.data_ptr() < end and tensor.dtype == weight.dtype and weight.is_contiguous():
                assert self._expert is not None
                offset = (tensor.data_ptr() - start) // weight.itemsize
                return _Note(name, self._expert, weight.dtype, tuple(tensor.shape), tensor.stride(), offset)
        return tensor

    def _had_again(self, saved: Tensor | _Note) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with torch.no_grad():
            weight = self._again(saved.name, saved.expert)
            weight = self._adaptation.weight(saved.expert, saved.name, weight).to(saved.dtype)
        return weight.as_strided(saved.size, saved.stride, weight.storage_offset() + saved.offset)


def _autocast_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which autocast would multiply a matrix; any other tensor keeps its own."""
    device = weight.device.type
    if weight.dim() != 2 or weight.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)
