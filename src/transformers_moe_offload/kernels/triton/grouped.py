"""Launch the kernels: those that multiply with one packed matrix, and those that multiply each row with its expert's.

One launch computes all experts, without copying weights: kernels read records in place. The host reads no tensor, and
launches depend on shapes only, so all of it can be captured in a CUDA graph.
"""

# T tokens, K experts per token, E experts, P = T * K pairs, N rows and C columns of a matrix, I outputs of a gate

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transformers_moe_offload.kernels.grouped import Activation, Pairs, PlacedMatrix
from transformers_moe_offload.kernels.packed import PackedMatrix
from transformers_moe_offload.kernels.triton.pairs import combine_kernel, order_kernel
from transformers_moe_offload.kernels.triton.row import grouped_row_kernel, row_kernel
from transformers_moe_offload.kernels.triton.sizes import (
    dense_row_sizes,
    formats,
    most_tiles,
    programs,
    row_sizes,
    tile_height,
    tile_sizes,
)
from transformers_moe_offload.kernels.triton.tile import grouped_tile_kernel, tile_kernel

PARTS = ("codes", "high", "scale", "zero", "scale_range", "zero_range")
"""Arrays of a matrix in the order in which kernels take them."""


def linear(rows: Tensor, matrix: PackedMatrix) -> Tensor:
    """rows (P, C) float32, bfloat16 or float16 -> their products with the rows of one packed matrix, (P, N)."""
    packing = matrix.packing
    rows = rows.contiguous()
    count, cols = rows.shape
    assert cols == packing.cols
    out = torch.empty((count, packing.rows), dtype=rows.dtype, device=rows.device)
    parts = [matrix.parts.get(name, matrix.parts["codes"]) for name in PARTS]
    arguments = (rows, out, *parts, packing.rows, cols)
    with torch.cuda.device_of(rows):
        if count == 1:
            sizes = row_sizes(packing)
            grid = (1, programs(packing.rows, packing, sizes))
            row_kernel[grid](*arguments, **formats(packing), **sizes)
        elif count:
            sizes = tile_sizes(packing, rows.dtype, tile_height(rows.dtype, count))
            grid = (triton.cdiv(count, sizes["height"]), programs(packing.rows, packing, sizes))
            tile_kernel[grid](*arguments, count, **formats(packing), **sizes)
    return out


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

MOST_PAIRS = 1024
"""Most pairs that our own kernel sorts, by counting for each pair those before it; torch sorts a prompt's pairs."""
COMPARISONS = 8192
"""Comparisons that the sorting kernel makes at a time."""
WIDTH = 512
"""Columns of output that one program combines."""


def ordered(pairs: Pairs) -> Pairs:
    """The pairs with `order` and `offsets`: sorted by expert, so that pairs of one expert are computed in tiles."""
    chosen, weights, num_experts = pairs.chosen, pairs.weights, pairs.num_experts
    assert chosen is not None
    device = chosen.device
    if pairs.num_pairs > MOST_PAIRS:
        is_idle = (chosen < 0) | (chosen >= num_experts)
        if weights is not None:
            is_idle |= weights == 0
        expert, order = torch.sort(torch.where(is_idle, num_experts, chosen), stable=True)
        bounds = torch.arange(num_experts + 1, dtype=expert.dtype, device=device)
        return pairs._replace(order=order.int(), offsets=torch.searchsorted(expert, bounds, out_int32=True))
    order = torch.empty(pairs.num_pairs, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    most_pairs = triton.next_power_of_2(max(pairs.num_pairs, 16))
    most_experts = triton.next_power_of_2(num_experts + 1)
    step = max(4, min(most_pairs, COMPARISONS // max(most_pairs, most_experts)))
    with torch.cuda.device_of(order):
        order_kernel[(1,)](
            chosen, chosen if weights is None else weights, order, offsets, pairs.num_pairs, num_experts,
            has_weights=weights is not None, most_pairs=most_pairs, most_experts=most_experts, step=step,
        )  # fmt: skip
    return pairs._replace(order=order, offsets=offsets)


class Product:
    """Products with one matrix of every expert of a layer, and their activation.

    Built once per matrix: everything that does not depend on the rows is computed here, not at each step.
    """

    def __init__(self, matrix: PlacedMatrix, activation: Activation | None = None) -> None:
        assert activation is None or matrix.can_activate(activation)
        self.cols = matrix.cols
        self.outputs = matrix.rows // 2 if activation is not None and activation.has_gate else matrix.rows
        self._matrix = matrix
        packing, places = matrix.packing, matrix.places
        at = [places["weight"] if packing is None else places["codes"], *(places.get(name, 0) for name in PARTS[1:])]
        self._numbers = (*at, places.get("bias", 0), matrix.rows, matrix.cols)
        self._constants = constants(matrix, activation)
        if packing is None:
            self._row_sizes = dense_row_sizes(matrix.cols, is_transposed=matrix.is_transposed)
        else:
            self._row_sizes = row_sizes(packing)
        self._row_programs = programs(matrix.rows, packing, self._row_sizes)
        self._tiles: dict[tuple[torch.dtype, int], tuple[dict[str, int], int]] = {}

    def __call__(self, rows: Tensor, pairs: Pairs) -> Tensor:
        """Products of the pairs' tokens with their experts' matrices, (P, N), or (P, I) with an activation of gates.

        rows (P / choices, C) float32, bfloat16 or float16. Rows of idle pairs are zeros. With `pairs.offsets` pairs of
        one expert are computed in tiles, else each pair on its own.
        """
        rows = rows.contiguous()
        count, num_experts = pairs.num_pairs, pairs.num_experts
        assert rows.shape == (count // pairs.choices, self.cols)
        out = torch.empty((count, self.outputs), dtype=rows.dtype, device=rows.device)
        if not count:
            return out
        with torch.cuda.device_of(rows):
            if pairs.offsets is None:
                assert pairs.chosen is not None
                weights = pairs.chosen if pairs.weights is None else pairs.weights
                grouped_row_kernel[count, self._row_programs](
                    rows, out, pairs.chosen, weights, pairs.addresses, *self._numbers, num_experts, pairs.choices,
                    has_weights=pairs.weights is not None, **self._constants, **self._row_sizes,
                )  # fmt: skip
            else:
                height = tile_height(rows.dtype, pairs.rows_per_expert)
                sizes, num_programs = self._tiles_for(rows.dtype, height)
                order = pairs.offsets if pairs.order is None else pairs.order
                grouped_tile_kernel[most_tiles(count, num_experts, height), num_programs](
                    rows, out, order, pairs.offsets, pairs.addresses, *self._numbers, num_experts, pairs.choices, count,
                    is_sorted=pairs.order is None, most_experts=triton.next_power_of_2(num_experts + 1),
                    **self._constants, **sizes,
                )  # fmt: skip
        return out

    def _tiles_for(self, dtype: torch.dtype, height: int) -> tuple[dict[str, int], int]:
        """How tiles are cut, and how many programs compute one row of a tile."""
        found = self._tiles.get((dtype, height))
        if found is None:
            packing = self._matrix.packing
            sizes = tile_sizes(packing, dtype, height)
            found = self._tiles[dtype, height] = sizes, programs(self._matrix.rows, packing, sizes)
        return found


def combine(rows: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """rows (P, H) of the pairs -> (T, H), weighted and added up over a token's choices in their order, in float32."""
    assert pairs.chosen is not None
    assert pairs.weights is not None
    count, width = rows.shape
    tokens = count // pairs.choices
    out = torch.empty((tokens, width), dtype=dtype, device=rows.device)
    if tokens:
        with torch.cuda.device_of(rows):
            combine_kernel[(tokens, triton.cdiv(width, WIDTH))](
                rows.contiguous(), out, pairs.chosen, pairs.weights, width, pairs.num_experts, pairs.choices,
                width=WIDTH,
            )  # fmt: skip
    return out


def constants(matrix: PlacedMatrix, activation: Activation | None) -> dict[str, Any]:
    """The compile-time constants of the kernels, except sizes."""
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
