"""Launch the kernels that multiply rows with the matrices of the experts they belong to.

One launch for all experts, and without copying a weight: kernels read records where they are. Nothing is read on the
host, and what is launched depends on shapes only, so that all of it can be captured in a CUDA graph.
"""

# T tokens, K experts per token, E experts, P = T * K pairs, N rows and C columns of a matrix, I outputs of a gate

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transformers_moe_offload.kernels.grouped import Activation, Pairs, PlacedMatrix
from transformers_moe_offload.kernels.triton.launch import PARTS
from transformers_moe_offload.kernels.triton.pairs import combine_kernel, order_kernel
from transformers_moe_offload.kernels.triton.row import grouped_row_kernel
from transformers_moe_offload.kernels.triton.sizes import (
    dense_row_sizes,
    fields,
    formats,
    most_tiles,
    programs,
    row_sizes,
    tile_sizes,
)
from transformers_moe_offload.kernels.triton.tile import grouped_tile_kernel

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

MOST_PAIRS = 1024
"""That our own kernel sorts, each by counting all that come before it; a prompt's pairs are sorted by torch."""
COMPARISONS = 8192
"""That it makes at a time."""
WIDTH = 512
"""Columns of output that one program combines."""


def ordered(pairs: Pairs) -> Pairs:
    """The pairs, sorted by expert, so that tiles of those that share one can be computed together."""
    count, num_experts, device = pairs.count, pairs.num_experts, pairs.chosen.device
    if count > MOST_PAIRS:
        expert = torch.where((pairs.chosen < 0) | (pairs.chosen >= num_experts), num_experts, pairs.chosen)
        if pairs.weights is not None:
            expert = torch.where(pairs.weights == 0, num_experts, expert)
        expert, order = torch.sort(expert, stable=True)
        offsets = torch.searchsorted(
            expert, torch.arange(num_experts + 1, dtype=expert.dtype, device=device), out_int32=True
        )
        return replace(pairs, order=order.int(), offsets=offsets)
    order = torch.empty(count, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    most_pairs = triton.next_power_of_2(max(count, 16))
    most_experts = triton.next_power_of_2(num_experts + 1)
    weights = pairs.chosen if pairs.weights is None else pairs.weights
    with torch.cuda.device_of(order):
        order_kernel[(1,)](
            pairs.chosen,
            weights,
            order,
            offsets,
            count,
            num_experts,
            has_weights=pairs.weights is not None,
            most_pairs=most_pairs,
            most_experts=most_experts,
            step=max(4, min(most_pairs, COMPARISONS // max(most_pairs, most_experts))),
        )
    return replace(pairs, order=order, offsets=offsets)


def linear(rows: Tensor, matrix: PlacedMatrix, pairs: Pairs, activation: Activation | None = None) -> Tensor:
    """Products of the pairs' tokens with their experts' matrices, (P, N), or what the activation makes of them, (P, I).

    rows (P / choices, C) float32, bfloat16 or float16. Rows of idle pairs come out as zeros. With `pairs.offsets` tiles
    are computed, else each pair on its own.
    """
    rows = rows.contiguous()
    count, num_experts = pairs.count, pairs.num_experts
    assert rows.shape == (count // pairs.choices, matrix.cols)
    width = matrix.rows if activation is None else activation.outputs(matrix.rows)
    out = torch.empty((count, width), dtype=rows.dtype, device=rows.device)
    if not count:
        return out
    packing, places = matrix.packing, matrix.places
    num_fields = 1 if packing is None else fields(packing)
    at = [places["weight"] if packing is None else places["codes"], *(places.get(name, 0) for name in PARTS[1:])]
    arguments = (*at, places.get("bias", 0), matrix.rows, matrix.cols, num_experts, pairs.choices)
    compiled_for = constants(matrix, activation)
    with torch.cuda.device_of(rows):
        if pairs.offsets is None:
            sizes = (
                dense_row_sizes(matrix.cols, is_transposed=matrix.is_transposed)
                if packing is None
                else row_sizes(packing)
            )
            weights = pairs.chosen if pairs.weights is None else pairs.weights
            grid = (count, programs(matrix.rows, num_fields, sizes))
            grouped_row_kernel[grid](
                rows, out, pairs.chosen, weights, pairs.addresses, *arguments,
                has_weights=pairs.weights is not None, **compiled_for, **sizes,
            )  # fmt: skip
        else:
            sizes = tile_sizes(packing, rows.dtype, min(pairs.num_tokens, triton.cdiv(count, num_experts)))
            tiles = most_tiles(count, num_experts, sizes["height"])
            grid = (tiles, programs(matrix.rows, num_fields, sizes))
            order = pairs.offsets if pairs.order is None else pairs.order
            grouped_tile_kernel[grid](
                rows, out, order, pairs.offsets, pairs.addresses, *arguments, count,
                is_sorted=pairs.order is None, most_experts=triton.next_power_of_2(num_experts + 1),
                **compiled_for, **sizes,
            )  # fmt: skip
    return out


def can_activate(matrix: PlacedMatrix, activation: Activation) -> bool:
    """Whether the program that computes a gate computes its up, too."""
    if not activation.has_gate:
        return True
    if matrix.rows % 2:
        return False
    num_fields = 1 if matrix.packing is None else fields(matrix.packing)
    if activation.is_interleaved:
        return num_fields == 1 or -(-matrix.rows // num_fields) % 2 == 0
    return matrix.rows % num_fields == 0


def combine(rows: Tensor, pairs: Pairs) -> Tensor:
    """rows (P, H) of the pairs -> (T, H), weighted and added up over a token's choices in their order, in float32."""
    assert pairs.weights is not None
    count, width = rows.shape
    tokens = count // pairs.choices
    out = torch.empty((tokens, width), dtype=rows.dtype, device=rows.device)
    if tokens:
        with torch.cuda.device_of(rows):
            combine_kernel[(tokens, triton.cdiv(width, WIDTH))](
                rows.contiguous(), out, pairs.chosen, pairs.weights, width, pairs.num_experts, pairs.choices,
                width=WIDTH,
            )  # fmt: skip
    return out


def constants(matrix: PlacedMatrix, activation: Activation | None) -> dict[str, Any]:
    """What kernels are compiled for, sizes apart."""
    packing = matrix.packing
    if packing is None:
        assert matrix.dtype is not None
        constants: dict[str, Any] = {"nbits": 8 * matrix.dtype.itemsize, "group_size": 1, "meta_nbits": 16}
        constants["dtype"] = DTYPES[matrix.dtype]
    else:
        constants = formats(packing) | {"dtype": tl.uint8}
    constants["is_transposed"] = matrix.is_transposed
    constants["bias_dtype"] = None if matrix.bias_dtype is None else DTYPES[matrix.bias_dtype]
    if activation is None:
        return constants | {"function": "none", "gate": "none", "limit": None, "slope": 1.0, "shift": 0.0}
    gate = "none"
    if activation.has_gate:
        gate = "neighbours" if activation.is_interleaved else "halves"
    return constants | {
        "function": activation.function,
        "gate": gate,
        "limit": activation.limit,
        "slope": activation.slope,
        "shift": activation.shift,
    }
