"""A few rows times a matrix of floats, norms by the root mean square, and routers, by the kernels of `csrc`."""

# T rows, K inputs, N outputs, H hidden, E experts

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.dense import FEW_ROWS as MOST_ROWS

__all__ = ["MOST_ROWS", "Norm", "Preference", "Route", "linear", "normalised", "routed", "takes"]


class Norm(NamedTuple):
    """`row / sqrt(mean(row ** 2) + epsilon) * (weight + shift)`, in float32."""

    epsilon: float
    shift: float = 0.0
    rounds: bool = True
    """Whether the row is rounded to its dtype before it is multiplied by the weight."""


class Route(NamedTuple):
    """How a router's logits become scores, in float32, and which experts a token takes."""

    choices: int
    """Experts that a token takes: those with the largest logits, in descending order."""
    is_sigmoid: bool
    """Whether scores are sigmoids; else they are a softmax."""
    is_late: bool
    """Whether only the logits of the experts that are taken become scores."""
    normalises: bool
    """Whether the scores of a token are divided by their sum."""
    dtype: torch.dtype
    """Of the scores."""


class Preference(NamedTuple):
    """Residents that a router is to prefer, as `routing/strategies/cache_aware.py` says."""

    resident: Tensor | None
    """(E,) bool; None where tokens are counted and chosen for as without it, as in prompts."""
    strength: float
    protect: int
    """Fewer than the choices of the route."""
    sums: Tensor
    """(2,) float64: ranges of affinities, and tokens; this call's are added in place."""


def takes(values: Tensor, weight: Tensor) -> bool:
    """Whether kernels compute with these tensors as they are, and nothing but the result is asked for."""
    return (
        not torch.compiler.is_compiling()  # first, because torch.compile cannot look into the rest
        and type(values) is Tensor
        and values.is_cpu
        and weight.is_cpu
        and values.dtype == weight.dtype
        and values.dtype in TYPES
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (values.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not is_watched()
    )


def is_watched() -> bool:
    """Whether operations are traced or replaced by a mode of torch functions or of dispatch."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (..., K), at most `MOST_ROWS`, weight (N, K), bias (N) -> (..., N), all of one dtype of `TYPES`; weight and
    bias are contiguous."""
    num_rows, num_cols = weight.shape
    rows = rows.contiguous()
    out = torch.empty((*rows.shape[:-1], num_rows), dtype=rows.dtype)
    number, library = TYPES[rows.dtype], native.library()
    assert library is not None
    if library.moe_dense(
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        number,
        num_rows,
        num_cols,
        rows.data_ptr(),
        number,
        rows.numel() // num_cols,
        out.data_ptr(),
        torch.get_num_threads(),
    ):
        raise MemoryError(f"no memory for rows of {num_cols} numbers")
    return out


def normalised(rows: Tensor, weight: Tensor | None, norm: Norm) -> Tensor:
    """rows (..., K), weight (K) of one dtype of `TYPES` -> (..., K)."""
    rows = rows.contiguous()
    out, cols = torch.empty_like(rows), rows.shape[-1]
    library = native.library()
    assert library is not None
    if library.moe_norm(
        rows.data_ptr(),
        TYPES[rows.dtype],
        rows.numel() // cols,
        cols,
        0 if weight is None else weight.data_ptr(),
        0 if weight is None else TYPES[weight.dtype],
        norm.epsilon,
        norm.shift,
        norm.rounds,
        out.data_ptr(),
    ):
        raise MemoryError(f"no memory for rows of {cols} numbers")
    return out


def routed(
    rows: Tensor, weight: Tensor, route: Route, preference: Preference | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """rows (T, H), at most `MOST_ROWS`, weight (E, H) -> logits (T, E), scores (T, K), experts (T, K) int64."""
    rows, number, library = rows.contiguous(), TYPES[rows.dtype], native.library()
    assert library is not None
    if preference is not None:
        assert preference.protect < route.choices
        assert preference.resident is None or preference.resident.shape == (len(weight),)
    num_rows, (num_experts, hidden) = rows.numel() // rows.shape[-1], weight.shape
    logits = torch.empty((num_rows, num_experts), dtype=rows.dtype)
    scores = torch.empty((num_rows, route.choices), dtype=route.dtype)
    index = torch.empty((num_rows, route.choices), dtype=torch.int64)
    if library.moe_route(
        weight.data_ptr(),
        rows.data_ptr(),
        number,
        num_rows,
        hidden,
        num_experts,
        route.choices,
        route.is_sigmoid,
        route.is_late,
        route.normalises,
        logits.data_ptr(),
        scores.data_ptr(),
        TYPES[route.dtype],
        index.data_ptr(),
        0 if preference is None or preference.resident is None else preference.resident.data_ptr(),
        0.0 if preference is None else preference.strength,
        0 if preference is None else preference.protect,
        0 if preference is None else preference.sums.data_ptr(),
        torch.get_num_threads(),
    ):
        raise MemoryError(f"no memory for rows of {hidden} numbers")
    return logits, scores, index
