"""Routers: a matrix, a softmax or sigmoids, and the experts with the largest scores."""

# T tokens, H hidden, E experts, K experts per token

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.hf.few_rows.swapped import FewRows, reads_config
from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.few_rows import MOST_ROWS, Route, routed, takes

_ROWS = 8
"""Random tokens by which a router is tried."""


class FewRowsRouter(FewRows):
    """Mixed into the class of a router that returns logits (T, E), scores (T, K) and experts (T, K)."""

    how: Route

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hidden_states (..., H) -> as the router's own forward. Where hooks watch a router, its own forward runs: they
        may replace what it chooses (`routing/interception.py`)."""
        module: Any = self
        weight = module.weight
        if (
            not module.training
            and len(args) == 1
            and not kwargs
            and 0 < args[0].numel() <= MOST_ROWS * weight.shape[1]
            and not module._forward_hooks
            and not module._forward_pre_hooks
            and takes(args[0], weight)
        ):
            return routed(args[0], weight, self.how)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


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
        if [one.shape for one in of_texts] != [
            one.shape for one in found
        ]:  # the kernel forgets which text a token is of
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
