"""Find out by trying whether kernels can do what a module does between its two products.

A module's gate is code of its own. But most of them are one of a few formulas, with numbers that the module keeps as
attributes. So these formulas are tried on values of all sizes, and one that always gives the module's results is taken.
If none does, the module computes its activation itself.
"""

# S values tried

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.kernels.grouped import Activation, Function

_SIZES = torch.logspace(-2, 4, 13, dtype=torch.float64)
_VALUES = torch.cat([-_SIZES.flip(0), torch.zeros(1, dtype=torch.float64), _SIZES])
"""Up to 10,000, so that every limit that products could ever reach has an effect."""

_RTOL, _ATOL = 1e-5, 1e-6
"""Modules may compute in float32, whatever they are given."""


def recognised(mlp: ExpertMlp, experts: Any) -> Activation | None:
    """The module's activation in terms of the kernels; None if they do not have it."""
    gate, up = torch.meshgrid(_VALUES, _VALUES, indexing="ij")
    gate, up = gate.reshape(1, -1), up.reshape(1, -1)
    layouts: list[tuple[bool, Tensor]] = [(False, torch.cat([gate, up], -1))]
    if mlp.has_gate:
        layouts.append((True, torch.stack([gate, up], -1).reshape(1, -1)))
    for is_interleaved, products in layouts:
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                found = mlp.activate(experts, products.clone()).double()
        except (RuntimeError, TypeError, AttributeError, IndexError):
            return None  # it needs something that is not here, such as its own device
        for candidate in _candidates(mlp, experts, is_interleaved):
            expected = activate(candidate, products)
            if found.shape == expected.shape and torch.allclose(found, expected, _RTOL, _ATOL):
                return candidate
    return None


def activate(activation: Activation, products: Tensor) -> Tensor:
    """The formula of an activation, in torch: products (..., N) -> (..., I)."""
    if not activation.has_gate:
        return _function(activation, products)
    if activation.is_interleaved:
        gate, up = products[..., ::2], products[..., 1::2]
    else:
        gate, up = products.chunk(2, dim=-1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return _function(activation, gate) * (up + activation.shift)


def _function(activation: Activation, x: Tensor) -> Tensor:
    match activation.function:
        case "silu":
            return x * torch.sigmoid(activation.slope * x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case "relu2":
            return functional.relu(x).square()


def _candidates(mlp: ExpertMlp, experts: Any, is_interleaved: bool) -> Iterator[Activation]:
    """The activations that are tried, with the module's own limits and slopes."""
    numbers = [
        float(value)
        for name, value in vars(experts).items()
        if isinstance(value, (int, float)) and any(word in name for word in ("limit", "alpha", "clamp", "beta"))
    ]
    for function in get_args(Function):
        slopes = [1.0, *numbers] if function == "silu" else [1.0]
        for slope in slopes:
            if not mlp.has_gate:
                yield Activation(function, slope=slope)
                continue
            for limit in (None, *numbers):
                for shift in (0.0, 1.0):
                    yield Activation(function, True, is_interleaved, limit, slope, shift)
