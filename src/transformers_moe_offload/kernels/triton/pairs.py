"""The pairs of a layer on the device: which are idle, their order, and their sum over a token's choices.

The host reads none of these tensors, and no launch depends on their content.
"""

# P pairs, K experts per token, E experts, H hidden

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_of(chosen, weights, p, is_pair, num_experts, has_weights: tl.constexpr):
    """The expert of each pair; `num_experts` for idle pairs, and where `is_pair` is False."""
    expert = tl.load(chosen + p, mask=is_pair, other=0).to(tl.int32)
    is_wanted = (expert >= 0) & (expert < num_experts) & is_pair
    if has_weights:
        is_wanted = is_wanted & (tl.load(weights + p, mask=is_pair, other=0) != 0)
    return tl.where(is_wanted, expert, num_experts)


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def order_kernel(
    chosen, weights, order, offsets, num_pairs, num_experts,
    has_weights: tl.constexpr, most_pairs: tl.constexpr, most_experts: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """Grid (1,). Sort few pairs by expert, idle ones last: a pair's place is the number of pairs that come before it.

    chosen (P,), weights (P,) -> order (P,) int32, offsets (E + 1,) int32.
    """
    p = tl.arange(0, most_pairs)
    expert = expert_of(chosen, weights, p, p < num_pairs, num_experts, has_weights)
    place = tl.zeros((most_pairs,), tl.int32)
    bound = tl.arange(0, most_experts)
    below = tl.zeros((most_experts,), tl.int32)
    for first in range(0, num_pairs, step):
        q = first + tl.arange(0, step)
        other = expert_of(chosen, weights, q, q < num_pairs, num_experts, has_weights)
        is_tie = (other[None, :] == expert[:, None]) & (q[None, :] < p[:, None])
        is_before = (other[None, :] < expert[:, None]) | is_tie
        place += tl.sum((is_before & (q < num_pairs)[None, :]).to(tl.int32), axis=1)
        is_below = (other[None, :] < bound[:, None]) & (q < num_pairs)[None, :]
        below += tl.sum(is_below.to(tl.int32), axis=1)
    tl.store(order + place, p.to(tl.int32), mask=p < num_pairs)
    tl.store(offsets + bound, below, mask=bound <= num_experts)


@triton.jit(do_not_specialize=["num_experts", "choices"])
def combine_kernel(rows, out, chosen, weights, num_cols, num_experts, choices, width: tl.constexpr):
    """Grid (T, ceil(H / width)). Weight the rows (T * K, H) of a token's choices and add them up in their order, in
    float32: out (T, H). Rows of idle pairs are not read.
    """
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * width + tl.arange(0, width)
    total = tl.zeros((width,), tl.float32)
    for choice in range(choices):
        p = t * choices + choice
        is_wanted = expert_of(chosen, weights, p, p >= 0, num_experts, True) < num_experts
        row = tl.load(rows + p * num_cols + col, mask=(col < num_cols) & is_wanted, other=0)
        total += tl.load(weights + p, mask=is_wanted, other=0).to(tl.float32) * row.to(tl.float32)
    tl.store(out + t * num_cols + col, total.to(out.dtype.element_ty), mask=col < num_cols)
