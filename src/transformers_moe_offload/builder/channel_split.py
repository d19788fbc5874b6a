"""Which channels of one feed-forward block go into which part, when it is split into experts.

Parts of a block's channels are drawn at random, alike, or active together. A gated block is a sum over its channels, so
the parts of any partition add up to the block.
"""

# I channels, n parts, D dimensions, N tokens

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.builder.layerwise.run import run
from transformers_moe_offload.builder.recipe import Split
from transformers_moe_offload.builder.sources.base import Source
from transformers_moe_offload.builder.texts.expert_texts import Texts
from transformers_moe_offload.builder.texts.windows import Windows, window_length, windows_of
from transformers_moe_offload.errors import RecipeError

Parts = Sequence[Tensor]
"""The channels of each part in ascending order, int64; every channel is in exactly one."""

_ROUNDS = 30
"""Assignments settle within about 10; rounds after the best one are not used."""
ACTIVE_SHARE = 0.2
"""Share of channels that count as active for a token; each channel is then active for about 100 of 512 tokens."""
_GATE, _DOWN = ("gate_proj", "w1"), ("down_proj", "w2")
"""Names of these matrices in families of models."""


def channels_of(
    split: Split, base: Source, tokenizer: Any, ffn: Mapping[int, str], *, device: str = "cpu"
) -> Callable[[int], Parts]:
    """Layer -> the channels of each part of its block; the first `split.shared` parts are the shared ones.

    `k_means` clusters the rows of the gate projection, which decide when a channel is active. `co_activation` runs the
    calibration text through the model before this function returns.
    """
    if split.method == "co_activation":
        return _by_activation(split, base, tokenizer, ffn, device=device).__getitem__

    @cache
    def parts(layer: int) -> Parts:
        rows = base.read(f"{_module(base, ffn[layer], _GATE)}.weight")
        if split.method == "random":
            return random_parts(len(rows), split.num_experts, seed=split.seed + layer)
        return k_means_parts(rows, split.num_experts, seed=split.seed)

    return parts


def sizes_of(num_channels: int, num_parts: int) -> list[int]:
    """Channels of each part: as equal as can be, the larger ones first."""
    if num_parts > num_channels:
        raise RecipeError(f"a block of {num_channels} channels cannot be split into {num_parts} parts")
    small, larger = divmod(num_channels, num_parts)
    return [small + (part < larger) for part in range(num_parts)]


def random_parts(num_channels: int, num_parts: int, *, seed: int) -> Parts:
    """Channels dealt out at random."""
    order = torch.randperm(num_channels, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in order.split(sizes_of(num_channels, num_parts))]


def parts_of(labels: Tensor, num_parts: int) -> Parts:
    """The channels of each part, given the part of each channel, (I,) int64."""
    return [(labels == part).nonzero().flatten() for part in range(num_parts)]


def active(activations: Tensor) -> Tensor:
    """Which channels are active for which token, as in MoEfication (arXiv 2110.01786): (N, I) float -> (N, I) bool.

    A channel adds its activation times its column of the down projection; for each token the largest count as active.
    """
    count = max(1, round(activations.shape[-1] * ACTIVE_SHARE))
    chosen = activations.abs().topk(count, dim=-1).indices
    return torch.zeros_like(activations, dtype=torch.bool).scatter_(-1, chosen, True)


def co_activation_parts(active: Tensor, num_parts: int, *, num_shared: int = 0, seed: int) -> Parts:
    """Parts of channels that are active together, (N, I) bool; the first `num_shared` have those most often active."""
    sizes = sizes_of(active.shape[1], num_parts)
    often = active.sum(0).argsort(descending=True, stable=True)
    shared = list(often[: sum(sizes[:num_shared])].split(sizes[:num_shared])) if num_shared else []
    others = often[sum(sizes[:num_shared]) :].sort().values
    labels = balanced_k_means(active[:, others].T, sizes[num_shared:], seed=seed)
    return [part.sort().values for part in shared] + [others[part] for part in parts_of(labels, num_parts - num_shared)]


def k_means_parts(rows: Tensor, num_parts: int, *, seed: int) -> Parts:
    """Parts of channels whose rows, (I, D) of a floating dtype, point in similar directions."""
    return parts_of(balanced_k_means(rows, sizes_of(len(rows), num_parts), seed=seed), num_parts)


def balanced_k_means(rows: Tensor, sizes: Sequence[int], *, seed: int) -> Tensor:
    """The cluster of each row: rows (I, D) -> (I,) int64 in which cluster p occurs `sizes[p]` times.

    LLaMA-MoE (arXiv 2406.16554) clusters rows of a block's matrices so. Here a channel is assigned to the nearest
    cluster with room; a cluster that is nearest to too many channels takes those that would lose most in another.
    """
    assert sum(sizes) == len(rows), f"{sum(sizes)} places for {len(rows)} rows"
    rows = nn.functional.normalize(rows.float(), dim=-1)
    room = torch.tensor(sizes)
    centres = _spread(rows, len(sizes), seed)
    best, least = torch.zeros(len(rows), dtype=torch.int64), float("inf")
    for _ in range(_ROUNDS):
        distances = _distances(rows, centres)
        labels = _assigned(distances, room)
        cost = distances.gather(1, labels[:, None]).sum().item()
        if cost >= least:
            break
        best, least = labels, cost
        centres = torch.zeros_like(centres).index_add_(0, labels, rows) / room[:, None]
    return best


def _by_activation(
    split: Split, base: Source, tokenizer: Any, ffn: Mapping[int, str], *, device: str
) -> dict[int, Parts]:
    if split.dataset is None:
        raise RecipeError(
            "split.method: co_activation goes by what is active on some text; set split.dataset, or another method"
        )
    texts = [Texts("split", (), (), split.dataset)]
    windows = windows_of(texts, tokenizer, length=window_length(base.config), skip_bos=True)
    watched = {layer: [_module(base, block, _DOWN)] for layer, block in sorted(ffn.items())}
    taker = _Taker(split, windows)
    run(base, windows.batches, watched, taker, device=device)
    return taker.parts


class _Taker:
    """Computes parts from the inputs of the down projection: the channels' activations."""

    def __init__(self, split: Split, windows: Windows) -> None:
        self._split, self._windows = split, windows
        self._active: list[Tensor] = []
        self.parts: dict[int, Parts] = {}

    def seen(self, layer: int, path: str, batch: int, hidden: Tensor) -> None:
        sampled = self._windows.batches[batch].sampled.to(hidden.device)
        self._active.append(active(hidden[sampled]).cpu())  # sync: device -> host

    def passed(self, layer: int) -> None:
        split = self._split
        together = torch.cat(self._active)
        self.parts[layer] = co_activation_parts(together, split.num_experts, num_shared=split.shared, seed=split.seed)
        self._active = []


def _module(base: Source, block: str, names: tuple[str, ...]) -> str:
    for name in names:
        if f"{block}.{name}.weight" in base.tensors:
            return f"{block}.{name}"
    raise RecipeError(f"{base.name} has none of {', '.join(names)} in {block}, so its channels cannot be told apart")


def _spread(rows: Tensor, count: int, seed: int) -> Tensor:
    """Initial centres: rows, each drawn in proportion to its squared distance to those before (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = _distances(rows, rows[chosen]).flatten()
    while len(chosen) < count:
        odds = nearest.clone()
        odds[chosen] = 0
        if odds.sum() == 0:  # only copies of the chosen are left
            odds = torch.ones_like(odds)
            odds[chosen] = 0
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        nearest = torch.minimum(nearest, _distances(rows, rows[chosen[-1:]]).flatten())
    return rows[chosen]


def _distances(rows: Tensor, centres: Tensor) -> Tensor:
    """Squared distances: (I, D), (n, D) -> (I, n)."""
    squares = rows.square().sum(1)[:, None] + centres.square().sum(1)
    return (squares - 2 * rows @ centres.T).clamp(min=0)


def _assigned(distances: Tensor, room: Tensor) -> Tensor:
    """A cluster for each row, as many rows to each as it has room: (I, n), (n,) int64 -> (I,) int64."""
    labels = torch.full((len(distances),), -1)
    left = room.clone()
    waiting = torch.arange(len(distances))
    while len(waiting):
        costs = distances[waiting].masked_fill(left == 0, float("inf"))
        two, wanted = costs.topk(min(2, costs.shape[1]), largest=False)
        # How much worse the next cluster with room is; infinite where there is none.
        loss = two[:, -1] - two[:, 0] if two.shape[1] == 2 else two[:, 0]
        for cluster in wanted[:, 0].unique().tolist():
            asking = (wanted[:, 0] == cluster).nonzero().flatten()
            accepted = asking[loss[asking].argsort(descending=True, stable=True)[: int(left[cluster])]]
            labels[waiting[accepted]] = cluster
            left[cluster] -= len(accepted)
        waiting = (labels == -1).nonzero().flatten()
    return labels
