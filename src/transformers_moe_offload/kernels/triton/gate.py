"""Finish products before they are stored: bias, activation, gate."""

# T rows of a tile, M rows of the matrix that a program computes

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(x, function: tl.constexpr, slope: tl.constexpr):
    """One of the activations of `kernels/grouped.py`, float32."""
    if function == "silu":
        return x * tl.sigmoid(slope * x)
    elif function == "gelu":  # noqa: RET505 - Triton compiles only the branch that is taken
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif function == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(function == "relu" or function == "relu2")
        positive = tl.where(x < 0, 0.0, x)  # NaN stays NaN, as in torch
        return positive * positive if function == "relu2" else positive


@triton.jit
def halves(pairs):
    """Two tensors from one whose last dimension is 2."""
    first, second = tl.split(pairs)
    return first, second


@triton.jit
def store(
    out, p, is_row, total, row, num_rows, bias, is_expert,
    function: tl.constexpr, gate: tl.constexpr, limit: tl.constexpr, slope: tl.constexpr, shift: tl.constexpr,
    has_bias: tl.constexpr,
):  # fmt: skip
    """Finish products `total` (T, M) float32 and write them to the rows p (T,) of `out`, where `is_row`.

    `row` (M,) are the rows of the matrix; entries of `num_rows` or more are padding. `gate` is "none", "halves" if the
    second half of `row` are the ups of the first half, or "neighbours" if each up follows its gate. `is_expert` is
    False for idle pairs, which get no bias. out (P, N), or (P, N / 2) with gates.
    """
    if has_bias:
        total += tl.load(bias + row, mask=(row < num_rows) & is_expert, other=0).to(tl.float32)[None, :]
    height: tl.constexpr = total.shape[0]
    half: tl.constexpr = total.shape[1] // 2
    if gate == "none":
        width = num_rows
        if function != "none":
            total = activated(total, function, slope)
    else:
        width = num_rows // 2
        if gate == "halves":
            value, up = halves(tl.permute(tl.reshape(total, (height, 2, half)), (0, 2, 1)))
            row, _ = halves(tl.permute(tl.reshape(row, (2, half)), (1, 0)))
        else:
            value, up = halves(tl.reshape(total, (height, half, 2)))
            row, _ = halves(tl.reshape(row, (half, 2)))
            row = row // 2
        if limit is not None:
            value = tl.where(value > limit, limit, value)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        total = activated(value, function, slope) * (up + shift)
    mask = is_row[:, None] & (row < width)[None, :]
    tl.store(out + p[:, None] * width + row[None, :], total.to(out.dtype.element_ty), mask=mask)
