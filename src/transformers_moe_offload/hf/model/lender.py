"""Provide a layer's experts to the backward pass, and start loads of the experts that it needs next.

The backward pass needs the experts of the forward pass in reverse, those of the last layer first, so these loads are
never wrong.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transformers_moe_offload.backward.product import Use
from transformers_moe_offload.compute.forward import opened
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots.base import Weights

if TYPE_CHECKING:
    from transformers_moe_offload.hf.model.handle import OffloadRuntime
    from transformers_moe_offload.hf.model.layer import SparseLayer


class Lender:
    """Lends the experts of one layer to the backward pass of one forward."""

    def __init__(
        self,
        runtime: OffloadRuntime,
        layer: SparseLayer,
        device: torch.device,
        before: Lender | None,
        cast_to: torch.dtype | None = None,
    ) -> None:
        """`before` is the lender of the layer computed before this one, whose backward pass comes after. `cast_to` is
        the dtype that the forward multiplied in, None for the experts' own."""
        self._runtime = runtime
        self._layer = layer
        self._device = device
        self._before = None if before is None else weakref.ref(before)
        self._cast_to = cast_to
        self._experts: list[ExpertId] = []

    def used(self, experts: Sequence[int]) -> None:
        """Note the experts that the forward pass uses, and the backward pass will need."""
        self._experts = [ExpertId(self._layer.index, expert) for expert in sorted(experts, reverse=True)]

    def borrow(self, expert: int, use: Use) -> Tensor:
        """The result of `use` on an expert's weights, which are valid only during that call."""
        coding = self._runtime.source(self._layer).codings.of(expert)
        return self._computed(expert, lambda held: use(opened(held, coding, self._cast_to)))

    def copy(self, name: str, expert: int) -> Tensor:
        """A field of an expert, decoded, in memory of its own."""
        coding = self._runtime.source(self._layer).codings.of(expert)

        def copied(held: Weights) -> Tensor:
            weight = held[name] if coding is None else coding.decode_field(name, held)
            return weight.to(self._cast_to or weight.dtype, copy=True)

        return self._computed(expert, copied)

    def _computed(self, expert: int, use: Callable[[Weights], Tensor]) -> Tensor:
        cache = self._runtime.cache_for(self._layer, self._device)
        with cache.turn, cache.visit(self._layer.index, [expert]) as visit:
            held = visit.take(expert)
            self._runtime.load_ahead(self._upcoming(expert))
            out = use(held)
        cache.give_back()
        return out

    def _upcoming(self, expert: int) -> Iterator[ExpertId]:
        """The experts that the backward pass needs after this one, in that order."""
        own = (other for other in self._experts if other.expert < expert)
        before = None if self._before is None else self._before()
        return islice(chain(own, () if before is None else before._experts), _AHEAD)


_AHEAD = 2
"""Loads in flight while one expert is in use: one for the time that it takes, one more so that the link never idles."""
