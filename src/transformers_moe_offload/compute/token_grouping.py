"""Group the (token, choice) pairs of one layer by expert."""

# T tokens, K experts per token, E experts, P = T * K pairs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEW_PAIRS = 64
"""Up to so many pairs Python groups faster than a chain of small torch kernels (a decode step: about 8 pairs)."""


@dataclass(frozen=True)
class Grouping:
    """The pairs of a layer, grouped by the expert they need.

    A pair is *idle* if it needs none: its weight is zero, or its index is no expert's (expert parallelism marks
    experts of other ranks with `num_experts`; some architectures route to identity experts past the end).
    """

    tokens: dict[int, Tensor | list[int]]
    """Each needed expert, in ascending order -> the N tokens that want it."""
    row_of_pair: Tensor | list[int]
    """Where a pair's row is when the experts' outputs are stacked in the order of `tokens`, (P,) int64; idle pairs
    share one row more, at the end. A list where there are few pairs."""
    has_idle: bool
    by_last_use: list[int]
    """The needed experts by the last token that wants them, the earliest first: the next token is likely to want the
    last ones, too."""

    @property
    def experts(self) -> list[int]:
        """The needed experts in ascending order."""
        return list(self.tokens)


def group_by_expert(
    top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, *, keep_zero_weights: bool = False
) -> Grouping:
    """Group pairs by expert: top_k_index (T, K) int64, top_k_weights (T, K) float -> Grouping.

    A pair of weight zero adds nothing to the output and is idle, unless `keep_zero_weights`: the gradient of its
    weight is not zero.
    """
    num_choices = top_k_index.shape[-1]
    if top_k_index.numel() <= FEW_PAIRS and _is_on_host(top_k_index):
        is_one = len(top_k_index) == 1  # flattening would take as long as all the rest
        chosen = top_k_index.tolist()[0] if is_one else top_k_index.flatten().tolist()
        weights = top_k_weights.tolist()[0] if is_one else top_k_weights.flatten().tolist()
        needed = [
            expert if expert < num_experts and (keep_zero_weights or weight) else num_experts
            for expert, weight in zip(chosen, weights, strict=True)
        ]
        return _group_few(needed, num_choices, num_experts)
    flat = top_k_index.reshape(-1)
    is_idle = flat >= num_experts
    if not keep_zero_weights:
        is_idle = is_idle | (top_k_weights.reshape(-1) == 0)
    flat = torch.where(is_idle, num_experts, flat)
    if flat.numel() <= FEW_PAIRS:
        return _group_few(flat.tolist(), num_choices, num_experts)  # sync: device -> host
    order = torch.argsort(flat, stable=True)
    pairs = torch.arange(flat.numel(), device=flat.device)
    last_pair = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    last_pair.scatter_reduce_(0, flat, pairs, "amax")
    count = torch.bincount(flat, minlength=num_experts + 1)
    counts, last_pairs = torch.stack([count, last_pair]).tolist()  # sync: device -> host
    num_idle = counts.pop()
    tokens: dict[int, Tensor | list[int]] = {}
    start = 0
    for expert, number in enumerate(counts):
        if number:
            tokens[expert] = order[start : start + number] // num_choices
            start += number
    row_of_pair = torch.empty_like(order)
    row_of_pair[order] = pairs.clamp(max=order.numel() - num_idle)
    by_last_use = sorted(tokens, key=lambda expert: (last_pairs[expert] // num_choices, expert))
    return Grouping(tokens, row_of_pair, num_idle > 0, by_last_use)


def _is_on_host(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def _group_few(flat: list[int], num_choices: int, num_experts: int) -> Grouping:
    order = sorted(range(len(flat)), key=flat.__getitem__)
    num_idle = flat.count(num_experts)
    tokens: dict[int, list[int]] = {}
    row_of_pair = [len(flat) - num_idle] * len(flat)
    for row, pair in enumerate(order[: len(flat) - num_idle]):
        tokens.setdefault(flat[pair], []).append(pair // num_choices)
        row_of_pair[pair] = row
    by_last_use = list(tokens)
    if len(flat) > num_choices:  # several tokens; experts of the same last token stay in ascending order
        by_last_use.sort(key=lambda expert: tokens[expert][-1])
    return Grouping(dict(tokens), row_of_pair, num_idle > 0, by_last_use)
