"""Routers: a matrix, a softmax or sigmoids, and the experts with the largest scores."""

# T tokens, H hidden, E experts, K experts per token

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.hf.few_rows.swapped import FewRows, reads_config
from transformers_moe_offload.hf.routers.capture import is_asking
from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.few_rows import MOST_ROWS, Preference, Route, routed, takes

_ROWS = 8
"""Random tokens by which a router is tried."""


class Preferring:
    """The owner of hooks around a router that leaves its choice to the kernels, with residents to be preferred."""

    def preference(self) -> Preference | None:
        """Of the call that is under way; None if the router's own forward is to run, because it is watched."""
        raise NotImplementedError


class FewRowsRouter(FewRows):
    """Mixed into the class of a router that returns logits (T, E), scores (T, K) and experts (T, K)."""

    how: Route

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hidden_states (..., H) -> as the router's own forward. Where hooks watch a router, its own forward runs: they
        may replace what it chooses (`routing/interception.py`)."""
        module: Any = self
        if self.serves(args, kwargs):
            if not module._forward_hooks and not module._forward_pre_hooks:
                return routed(args[0], module.weight, self.how)
            preference = _preference(module)
            if preference is not None:
                return routed(args[0], module.weight, self.how, None if is_asking() else preference)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    @property
    def num_scores(self) -> int:
        """How many scores a token has: E."""
        module: Any = self
        return len(module.weight)

    def serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the kernels compute a call with these arguments."""
        module: Any = self
        return (
            not module.training
            and len(args) == 1
            and not kwargs
            and 0 < args[0].numel() <= MOST_ROWS * module.weight.shape[1]
            and takes(args[0], module.weight)
        )


def _preference(module: nn.Module) -> Preference | None:
    """What the owner of a router's hooks prefers; None if it does not leave the choice to the kernels."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    owner = next((owner for owner in owners if isinstance(owner, Preferring)), None)
    return None if owner is None else owner.preference()


def route_of(module: nn.Module) -> Route | None:
    """How a router on a CPU chooses, found by trying it on random tokens; None if the kernels cannot do it."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or list(module._parameters) != ["weight"]:
        return None
    if module._buffers or module._modules or not weight.is_cpu or weight.dtype not in TYPES or reads_config(module):
        return None
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, weight.shape[1], generator=random).to(weight.dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            found, of_texts = module.forward(rows), module.forward(rows[None])
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
            return None
        if not isinstance(found, tuple) or len(found) != 3 or not all(isinstance(one, Tensor) for one in found):
            return None
        logits, scores, index = found
        # The kernel forgets which text a token is of.
        if [one.shape for one in of_texts] != [one.shape for one in found]:
            return None
        if logits.shape != (_ROWS, len(weight)) or scores.shape != index.shape or index.dim() != 2:
            return None
        if logits.dtype != weight.dtype or scores.dtype not in TYPES or index.dtype != torch.int64:
            return None
        for is_sigmoid, is_late, normalises in product((False, True), repeat=3):
            route = Route(index.shape[1], is_sigmoid, is_late, normalises, scores.dtype)
            if _agrees(found, routed(rows, weight, route)):
                return route
    return None


def _agrees(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> bool:
    """Whether two answers are the same, but for rounding, and for which of equal logits come first."""
    tolerance = 2e-2 if expected[0].dtype != torch.float32 else 1e-5
    (logits, scores, index), (other_logits, other_scores, other_index) = expected, found
    chosen, other_chosen = logits.gather(1, index), logits.gather(1, other_index)
    pairs = ((logits, other_logits), (chosen, other_chosen), (scores, other_scores))
    return all(torch.allclose(one.float(), other.float(), tolerance, tolerance) for one, other in pairs)
