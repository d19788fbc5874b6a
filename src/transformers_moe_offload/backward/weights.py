"""Provide a layer's experts to the backward pass, and start loads of the experts that it needs next.

Autograd would keep every expert's weights until the backward pass, and they are views of slots that other experts will
have overwritten by then. So a product keeps a callback that fetches them again: the backward pass borrows one expert
after the other, in the order in which autograd comes to them, and nothing is computed twice. It needs the experts of
the forward pass in reverse, those of the last layer first, so loads that are started ahead are never wrong.
"""

# N rows

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.compute.forward import opened
from transformers_moe_offload.compute.mlp import ExpertMlp, ExpertWeights
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.formats.base import Codec, LayerCodecs
from transformers_moe_offload.store.layer_source import Weights

_AHEAD = 2
"""Loads in flight while one expert is in use: one for the time that it takes, one more so that the link never idles."""

Use = Callable[[ExpertWeights], Tensor]
"""Computes something with an expert's weights, and keeps none of them."""

Again = Callable[[Use], Tensor]
"""Fetches the expert whose weights a product had, and returns what is computed with it."""


class Lent(Protocol):
    """The experts of a layer at some time."""

    @property
    def cache(self) -> ExpertCache:
        """Where they are resident."""

    @property
    def codecs(self) -> LayerCodecs:
        """How they are stored."""


class Lenders:
    """Makes the lenders of a model's layers, each with a reference to that of the layer computed before."""

    def __init__(self, load_ahead: Callable[[Iterable[ExpertId]], None]) -> None:
        """`load_ahead` starts loads of experts of any layer."""
        self._load_ahead = load_ahead
        self._latest: weakref.ref[Lender] | None = None

    def lend(self, layer: int, now: Callable[[], Lent], cast_to: torch.dtype | None) -> Lender:
        """A new lender of a layer's experts, for the backward pass of one forward; see `Lender`."""
        before = None if self._latest is None else self._latest()
        lender = Lender(layer, now, self._load_ahead, before, cast_to)
        self._latest = weakref.ref(lender)
        return lender


class Lender:
    """Lends the experts of one layer to the backward pass of one forward."""

    def __init__(
        self,
        layer: int,
        now: Callable[[], Lent],
        load_ahead: Callable[[Iterable[ExpertId]], None],
        before: Lender | None,
        cast_to: torch.dtype | None = None,
    ) -> None:
        """`now` returns the layer's experts, whose cache may be another before the backward pass.
        `load_ahead` starts loads of experts of any layer. `before` is the lender of the layer computed before this one,
        whose backward pass comes after. `cast_to` is the dtype that the forward multiplied in, None for the experts'
        own."""
        self._layer = layer
        self._now = now
        self._load_ahead = load_ahead
        self._before = None if before is None else weakref.ref(before)
        self._cast_to = cast_to
        self._experts: list[ExpertId] = []

    def used(self, experts: Sequence[int]) -> None:
        """Note the experts that the forward pass uses, and the backward pass will need."""
        self._experts = [ExpertId(self._layer, expert) for expert in sorted(experts, reverse=True)]

    def borrow(self, expert: int, use: Use) -> Tensor:
        """The result of `use` on an expert's weights, which are valid only during that call."""
        return self._computed(expert, lambda held, codec: use(opened(held, codec, self._cast_to)))

    def copy(self, name: str, expert: int) -> Tensor:
        """A field of an expert, decoded, in memory of its own."""

        def copied(held: Weights, codec: Codec | None) -> Tensor:
            weight = held[name] if codec is None else codec.decode_field(name, held)
            return weight.to(self._cast_to or weight.dtype, copy=True)

        return self._computed(expert, copied)

    def _computed(self, expert: int, use: Callable[[Weights, Codec | None], Tensor]) -> Tensor:
        lent = self._now()
        cache, codecs = lent.cache, lent.codecs
        with cache.turn, cache.visit(self._layer, [expert]) as visit:
            held = visit.take(expert)
            self._load_ahead(self._upcoming(expert))
            out = use(held, codecs.of(expert))
        cache.give_back()
        return out

    def _upcoming(self, expert: int) -> Iterator[ExpertId]:
        """The experts that the backward pass needs after this one, in that order."""
        own = (other for other in self._experts if other.expert < expert)
        before = None if self._before is None else self._before()
        return islice(chain(own, () if before is None else before._experts), _AHEAD)


def borrowed_product(mlp: ExpertMlp, rows: Tensor, weights: ExpertWeights, name: str, again: Again) -> Tensor:
    """rows (N, in) -> their product with one field of an expert, (N, out); differentiable in the rows."""
    out: Tensor = _BorrowedProduct.apply(rows, mlp, weights, name, again)  # type: ignore[no-untyped-call]
    return out


class _BorrowedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, mlp: ExpertMlp, weights: ExpertWeights, name: str, again: Again) -> Tensor:
        ctx.mlp, ctx.name, ctx.again, ctx.dtype = mlp, name, again, rows.dtype
        return mlp.project(rows, weights, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.again(lambda weights: ctx.mlp.gradient(grad_outputs[0], weights, ctx.name))
        return gradient.to(ctx.dtype), None, None, None, None
