"""Gates from token embeddings alone: the same rows for every layer, and no pass through the model."""

# B windows, T tokens in each, E experts, H hidden

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.builder.gates.rows import directions
from transformers_moe_offload.builder.layerwise.skeleton import Skeleton
from transformers_moe_offload.builder.sources.base import Source
from transformers_moe_offload.builder.texts.windows import Windows


def embedding_rows(windows: Windows, base: Source, ffn_path: str, *, center: bool) -> Tensor:
    """Rows (E, H) float64 of length 1: the mean embedding of an expert's texts, less that of its negative prompts."""
    model = Skeleton(base, [ffn_path], torch.float32, "cpu")
    sums = torch.zeros(0)
    for batch, embedded in zip(windows.batches, model.embedded([b.tokens for b in windows.batches]), strict=True):
        if not len(sums):
            sums = torch.zeros(len(windows.counts), embedded.shape[-1], dtype=torch.float64)
        kept = torch.where(batch.counted[..., None], embedded, 0).sum(1, dtype=torch.float64)
        sums.index_add_(0, batch.lists, kept)
    mean = sums / torch.tensor(windows.counts, dtype=torch.float64).clamp(min=1)[:, None]
    return directions(mean[::2] - mean[1::2], center)
