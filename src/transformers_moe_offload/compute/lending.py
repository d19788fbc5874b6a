"""Lend experts' weights to a forward that autograd records, without autograd keeping them.

What autograd saves for the backward pass goes through hooks. A saved tensor that lies inside a weight that was lent is
replaced by a note: whose weight, which field, where in it. When autograd asks for it the weight is fetched again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

Fetch = Callable[[str, int], Tensor]
"""One field of one expert: (field name, expert) -> its tensor, valid until another expert is fetched."""


@dataclass(frozen=True)
class _Note:
    """A part of a weight."""

    name: str
    expert: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Elements between the beginning of the weight and that of the part."""


class Lending:
    """Gives out weights, and knows its own when it sees them again."""

    def __init__(self, fetch: Fetch, adapted: Callable[[int, str, Tensor], Tensor] | None = None) -> None:
        """`adapted` adds to a field of an expert what is to be added to it, perhaps differentiably."""
        self._fetch = fetch
        self._adapted = adapted
        self._lent: dict[str, Tensor] = {}
        self._expert: int | None = None

    def __call__(self, name: str, expert: int) -> Tensor:
        """A field of an expert; valid until one of another expert is asked for."""
        if expert != self._expert:
            self._lent, self._expert = {}, expert
        weight = self._fetch(name, expert)
        if self._adapted is not None:
            weight = self._adapted(expert, name, weight)
        self._lent[name] = weight
        return weight

    def remembered(self) -> AbstractContextManager[object]:
        """While this is open, autograd is given notes of what is lent."""
        return torch.autograd.graph.saved_tensors_hooks(self._noted, self._given_again)

    def _noted(self, tensor: Tensor) -> Tensor | _Note:
        for name, weight in self._lent.items():
            start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
            if start <= tensor.data_ptr() < end and tensor.dtype == weight.dtype and weight.is_contiguous():
                assert self._expert is not None
                offset = (tensor.data_ptr() - start) // weight.itemsize
                return _Note(name, self._expert, tuple(tensor.shape), tensor.stride(), offset)
        return tensor

    def _given_again(self, saved: Tensor | _Note) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with torch.no_grad():
            weight = self(saved.name, saved.expert)
        return weight.as_strided(saved.size, saved.stride, weight.storage_offset() + saved.offset)
