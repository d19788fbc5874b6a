"""Norms by the root mean square, which every architecture has in a class of its own."""

# K values of a row

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.hf.few_rows.swapped import FewRows
from transformers_moe_offload.kernels.few_rows import Norm, normalised, takes

_MOST_VALUES = 1 << 16
"""Of a tensor that is normalised by one thread; with more, torch's threads are as fast."""

_EPSILON = ("variance_epsilon", "eps", "epsilon")
"""What classes call the number that is added to the mean of the squares."""


class FewRowsNorm(FewRows):
    """Mixed into the class of a norm."""

    how: Norm

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states (..., K) -> (..., K)."""
        module: Any = self
        if not module.training and len(args) == 1 and not kwargs and 0 < args[0].numel() <= _MOST_VALUES:
            weight = module.weight
            if takes(args[0], weight):
                return normalised(args[0], weight, self.how)
        own: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        return own


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that a module computes; None if the kernels do not have it."""
    weight, plain_class, epsilon = module._parameters.get("weight"), type(module), _epsilon(module)
    if weight is None or weight.dim() != 1 or len(module._parameters) != 1 or module._modules or module._buffers:
        return None
    return None if epsilon is None else _norm_by_trial(plain_class, epsilon)  # type: ignore[arg-type]


def _epsilon(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in _EPSILON)
    return next((value for value in found if isinstance(value, float)), None)


@cache
def _norm_by_trial(plain_class: Any, epsilon: float) -> Norm | None:
    """The norm that a class computes, found by trial on random numbers; None if it is another one.

    In bfloat16 a few of thousands of values may be rounded to the other neighbour, because squares are added up in
    another order.
    """
    random = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(64, 96, generator=random), torch.randn(96, generator=random)
    candidates = [Norm(epsilon, shift, rounds) for shift in (0.0, 1.0) for rounds in (False, True)]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            values, scales = (2 * rows).to(dtype), weight.to(dtype)
            try:
                made = plain_class.__new__(plain_class)
                nn.Module.__init__(made)
                made.weight = nn.Parameter(scales)
                for name in _EPSILON:
                    setattr(made, name, epsilon)
                expected = made(values)
            except (RuntimeError, TypeError, AttributeError, ValueError):
                return None
            if expected.shape != values.shape or expected.dtype != dtype:
                return None
            tolerance = 1e-6 if dtype is torch.float32 else 2.0**-7
            found = {one: normalised(values, scales, one) for one in candidates}
            candidates = [
                one
                for one, result in found.items()
                if torch.allclose(result, expected, rtol=tolerance, atol=tolerance / 100)
            ]
            if dtype is torch.bfloat16 and candidates:
                off = {one: (found[one] != expected).float().mean().item() for one in candidates}
                best = min(candidates, key=off.__getitem__)
                return best if off[best] < 0.01 else None
    return None
