"""Held-out perplexity of a causal model and of the unigram baseline, on the same tokens.

Stock forward passes in fp32; windows do not overlap and the first token of each is context only.
"""

# B sequences, S positions, V vocabulary, N tokens

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from train_tokenizer import CONTEXT, VOCAB_SIZE
from training import token_ids


def held_out_windows(work: Path, domain: str, *, most: int) -> Tensor:
    """(B, S) int64, B <= `most` non-overlapping windows evenly spread over the domain's held-out text."""
    ids = token_ids(work, domain, "held_out")
    whole = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    kept = np.unique(np.linspace(0, len(whole) - 1, most).astype(int))
    return torch.from_numpy(whole[kept].astype(np.int64))


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean loss over every predicted token. windows (B, S) int64."""
    total = 0.0
    for part in windows.split(8):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        total += functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


def unigram_perplexity(train_ids: np.ndarray, windows: Tensor) -> float:
    """Perplexity of the training text's token frequencies (add-one), on the tokens `perplexity` predicts.

    train_ids (N,) uint16, windows (B, S) int64.
    """
    counts = torch.from_numpy(np.bincount(train_ids, minlength=VOCAB_SIZE)).double() + 1
    return math.exp(-(counts / counts.sum()).log()[windows[:, 1:]].mean().item())
