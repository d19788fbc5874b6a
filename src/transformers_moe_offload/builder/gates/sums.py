"""Sums over the hidden states at one layer, by list of texts, and a sample of them.

Memory does not depend on how much text there is: O(H^2) where the second moment is wanted, O(E H) else.
"""

# B windows, T tokens in each, H hidden, E experts, N sampled tokens

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformers_moe_offload.builder.texts.windows import Batch

SAMPLE_DTYPE = torch.bfloat16
"""The sample is rounded when it is taken, so that a file of statistics holds what was used."""


class Sums:
    """Sums over the hidden states at one place of one layer.

    Lists of texts are numbered as in `Batch.lists`; each list weighs the same, whatever its length.
    """

    def __init__(self, counts: Sequence[int], hidden_size: int, *, second_moment: bool) -> None:
        self.counts = torch.tensor(counts, dtype=torch.float64)
        """(2 E,): tokens by list."""
        self.tokens = torch.zeros(len(counts), hidden_size, dtype=torch.float64)
        """(2 E, H): sum over tokens."""
        self.last = torch.zeros_like(self.tokens)
        """(2 E, H): sum over windows of the last token."""
        self.window_means = torch.zeros_like(self.tokens)
        """(2 E, H): sum over windows of the mean over tokens."""
        self.windows = torch.zeros(len(counts), dtype=torch.float64)
        """(2 E,): windows by list."""
        self.second_moment = torch.zeros(hidden_size, hidden_size, dtype=torch.float64) if second_moment else None
        """(H, H): sum over lists of the mean of x x^T over a list's tokens."""

    def add(self, batch: Batch, hidden: Tensor) -> None:
        """Count one batch: hidden (B, T, H)."""
        counted = batch.counted
        sizes = counted.sum(1)
        has_any = sizes > 0
        kept = torch.where(counted[..., None], hidden.float(), 0)
        by_window = kept.sum(1, dtype=torch.float64)
        last = counted.shape[1] - 1 - counted.flip(1).int().argmax(1)
        last_hidden = kept[torch.arange(len(last)), last].double()
        self.tokens.index_add_(0, batch.lists, by_window)
        self.last.index_add_(0, batch.lists, last_hidden)
        self.window_means.index_add_(0, batch.lists, by_window / sizes.clamp(min=1)[:, None])
        self.windows.index_add_(0, batch.lists, has_any.double())
        if self.second_moment is not None:
            weights = (1 / self.counts[batch.lists]).sqrt().float()
            rows = (kept * weights[:, None, None])[counted]
            self.second_moment += (rows.T @ rows).double()

    @property
    def mean(self) -> Tensor:
        """(2 E, H) float64: mean over the tokens of each list, zero where it has none."""
        return self.tokens / self.counts.clamp(min=1)[:, None]

    @property
    def mean_last(self) -> Tensor:
        """(2 E, H) float64: mean over the windows of each list of their last token."""
        return self.last / self.windows.clamp(min=1)[:, None]

    @property
    def mean_of_means(self) -> Tensor:
        """(2 E, H) float64: mean over the windows of each list of their means."""
        return self.window_means / self.windows.clamp(min=1)[:, None]


def sample(batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The sampled hidden states of a batch, (n, H) bfloat16, and the expert whose texts each is from, (n,) int64."""
    owners = (batch.lists // 2)[:, None].expand_as(batch.sampled)
    return hidden[batch.sampled].to(SAMPLE_DTYPE), owners[batch.sampled]
