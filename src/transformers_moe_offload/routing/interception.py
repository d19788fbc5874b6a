"""Run a router's own code with another choice of experts in it.

Every router scores all experts, chooses some, and computes weights from their scores: softmax before or after the
choice, sigmoids, normalisation to a sum of one, factors, corrections that count for the choice only. This file repeats
none of it. While a router runs, this mode watches the torch functions that it calls
(`torch.overrides.TorchFunctionMode`). The call that chooses, a `topk` over all experts, returns a strategy's choice;
the architecture's own code then computes weights and gradients for that choice.

The caller makes the choice; `answer.py` checks that the router's output contains it.
"""

# T tokens, K experts per token, E experts

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.routing.choice import Choice


class Seen(NamedTuple):
    """What a router is about to choose by."""

    scores: Tensor
    """(T, E)"""
    top_k: int
    """Its own number of experts."""
    has_affinities: bool
    is_ranked: bool
    """Whether it takes the experts with the largest scores; False where they come from a table of token ids."""


Decide = Callable[[Seen], Choice | None]
"""Makes a choice, or returns None to let the router choose."""

_SCORE, _TOP_K, _ONE, _GATHER, _MASK = "score", "top_k", "one", "gather", "mask"

_WATCHED = {_TOP_K, _ONE, _GATHER, _MASK}

_KINDS: dict[Any, str] = {
    **dict.fromkeys((torch.softmax, Tensor.softmax, F.softmax, torch.sigmoid, Tensor.sigmoid, F.softplus), _SCORE),
    **dict.fromkeys((torch.topk, Tensor.topk), _TOP_K),
    **dict.fromkeys((torch.max, Tensor.max, torch.argmax, Tensor.argmax), _ONE),
    **dict.fromkeys((torch.gather, Tensor.gather), _GATHER),
    **dict.fromkeys((torch.masked_fill, Tensor.masked_fill), _MASK),
}


class Interception(TorchFunctionMode):
    """Lets `decide` choose in place of the router that runs inside a `with` block."""

    def __init__(self, num_experts: int, top_k: int | None, decide: Decide, *, has_groups: bool) -> None:
        super().__init__()
        self._num_experts = num_experts
        self._top_k = top_k
        self._decide = decide
        self._has_groups = has_groups
        # Tensors by id, kept alive so that ids are not reused.
        self._affinities: dict[int, Tensor] = {}
        self._later: dict[int, Tensor] = {}
        self._ruled_out: Tensor | None = None
        self._taken_from: list[Tensor] = []
        self.scores: Tensor | None = None
        """(T, E): the scores that the choice is made by; None before the choice."""
        self.has_affinities = False
        self.choice: Choice | None = None
        """The choice of the router or of a strategy."""
        self.is_ours = False
        self.own_experts: Tensor | None = None
        """The router's own choice, where the router still returns it although a strategy has chosen."""
        self._experts: Tensor | None = None
        self._is_dropped: Tensor | None = None
        self._is_raised: Tensor | None = None
        self._is_broken_off = False

    def break_off(self) -> None:
        """Stop watching and drop all tensors, although the `with` block is still open."""
        self._is_broken_off = True
        self._affinities, self._later, self._taken_from = {}, {}, []
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def came_later(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed after the choice."""
        return id(tensor) in self._later

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if self._is_broken_off:
            return func(*args, **kwargs)
        kind = _KINDS.get(func)
        out = self._watch(kind, func, args, kwargs) if kind in _WATCHED else func(*args, **kwargs)
        if isinstance(out, Tensor):
            if kind is _SCORE or not self._affinities.keys().isdisjoint(map(id, args)):
                self._affinities[id(out)] = out
            if self.choice is not None:
                self._later[id(out)] = out
        return out

    def _watch(self, kind: str | None, func: Any, args: Any, kwargs: Any) -> Any:
        source = args[0] if args else kwargs["input"]
        if kind is _TOP_K and self.choice is None and self._is_over_experts(source):
            return self._top(source, args[1] if len(args) > 1 else kwargs["k"], lambda: func(*args, **kwargs))
        if kind is _ONE and self._is_over_experts(source) and (len(args) > 1 or "dim" in kwargs):
            return self._one(source, func, args, kwargs)
        if kind is _GATHER:
            return self._gather(source, func, args, kwargs)
        if kind is _MASK and self.choice is None and self._is_over_experts(source):
            self._ruled_out = args[1] if len(args) > 1 else kwargs["mask"]
        return func(*args, **kwargs)

    def _is_over_experts(self, source: Tensor) -> bool:
        """Whether a tensor has a score for every expert; scores of groups or of experts within groups do not count."""
        if source.shape[-1] < self._num_experts or not source.is_floating_point():
            return False
        return source.dim() == 2 or (source.dim() == 3 and not self._has_groups)

    def _choose(self, source: Tensor, top_k: int, *, is_ranked: bool = True) -> bool:
        """Ask for a choice; False if the router is to choose itself."""
        scores = source.detach().reshape(-1, source.shape[-1])
        if self._ruled_out is not None and self._ruled_out.shape == scores.shape:
            scores = scores.masked_fill(self._ruled_out, -torch.inf)
        self.scores, self.has_affinities = scores, id(source) in self._affinities
        choice = self._decide(Seen(scores, top_k, self.has_affinities, is_ranked))
        if choice is None:
            return False
        self.choice, self.is_ours = choice, True
        self._experts = choice.experts.reshape(*source.shape[:-1], -1)
        if choice.is_kept is not None:
            # A token with no kept expert would normalise over an empty set (NaN, also in backward): keep its entries
            # here; `answer.py` sets its weights to zero in the router's output.
            is_empty = ~choice.is_kept.any(-1, keepdim=True)
            self._is_dropped = (~choice.is_kept & ~is_empty).reshape(self._experts.shape)
        if choice.is_raised is not None:
            self._is_raised = choice.is_raised.reshape(self._experts.shape)
        return True

    def _values(self, source: Tensor, dim: int = -1) -> Tensor:
        """The values that the router goes on with in place of the scores that it compares: those of the chosen experts.

        Raised entries have the token's best one, and those that only fill up a row 0 for affinities, minus infinity for
        logits.
        """
        assert self._experts is not None
        values = source.gather(dim, self._experts)
        if self._is_raised is not None:
            values = torch.where(self._is_raised, source.amax(dim, keepdim=True).to(values.dtype), values)
        if self._is_dropped is None:
            return values
        return values.masked_fill(self._is_dropped, 0 if id(source) in self._affinities else -torch.inf)

    def _top(self, source: Tensor, top_k: int, own: Callable[[], Any]) -> Any:
        if not self._choose(source, top_k):
            found = own()
            self.choice = Choice(found[1].reshape(-1, found[1].shape[-1]))
            self._remember(source, found[0])
            return found
        assert self._experts is not None
        values = self._values(source)
        self._remember(source, values)
        return torch.return_types.topk((values, self._experts))

    def _one(self, source: Tensor, func: Any, args: Any, kwargs: Any) -> Any:
        """For routers that take the best expert, rule it out, and take the best of the rest: a column for each call."""
        if self.choice is None and not self._choose(source, self._top_k or 1):
            self.choice = Choice(torch.empty(len(self.scores), 0, dtype=torch.int64, device=source.device))  # type: ignore[arg-type]
        assert self.choice is not None
        if all(source is not known for known in self._taken_from):
            self._taken_from.append(source)
            if not self.is_ours:
                best = source.detach().reshape(-1, source.shape[-1]).argmax(-1, keepdim=True)
                self.choice = Choice(torch.cat([self.choice.experts, best], dim=-1))
        if not self.is_ours:
            return func(*args, **kwargs)
        assert self._experts is not None
        column = next(number for number, known in enumerate(self._taken_from) if known is source)
        if self.choice.is_kept is not None or column >= self.choice.experts.shape[-1]:
            raise UnsupportedModelError(
                f"the router takes its experts one by one, {self._top_k or 1} for every token, and the strategy chose "
                f"{self.choice.experts.shape[-1]}{' or fewer' if self.choice.is_kept is not None else ''}; use a "
                f"strategy that keeps the model's own number"
            )
        experts = self.choice.experts[:, column].reshape(source.shape[:-1])
        if func in (torch.argmax, Tensor.argmax):
            return experts
        values = self._values(source)[..., column, None]
        keeps_dim = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
        pair = (values, experts[..., None]) if keeps_dim else (values[..., 0], experts)
        self._remember(source, pair[0])
        return torch.return_types.max(pair)

    def _gather(self, source: Tensor, func: Any, args: Any, kwargs: Any) -> Any:
        place = "index" if "index" in kwargs else 2
        index = kwargs["index"] if place == "index" else args[2]
        if self.choice is None and source.dim() == 2 and source.shape[-1] >= self._num_experts:
            # The router has compared no scores: its experts come from elsewhere, such as a table of token ids.
            if not self._choose(source, index.shape[-1], is_ranked=False):
                self.choice = Choice(index)
            else:
                self.own_experts = index
                index = self._experts
        if self._experts is None or index is not self._experts:
            return func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        return self._values(source, dim)

    def _remember(self, source: Tensor, values: Tensor) -> None:
        self._later[id(values)] = values
        if id(source) in self._affinities:
            self._affinities[id(values)] = values
