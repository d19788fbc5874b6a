"""A causal language model on held-out text: bits per byte."""

# B windows, T tokens in each, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.builder.texts.windows import BATCH_TOKENS, cut
from transformers_moe_offload.errors import RecipeError


@dataclass(frozen=True)
class HeldOut:
    """One domain's text, in windows of the same length side by side."""

    batches: tuple[Tensor, ...]
    """(B, T) int64; the first token of a window is context only."""
    nbytes: int
    """Bytes of the predicted text."""
    tokens: int
    """Number of predicted tokens."""


@dataclass(frozen=True)
class Score:
    """The bits that a model needs to predict a text."""

    bits: float
    nbytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which do not depend on the tokenizer."""
        return self.bits / self.nbytes


def held_out(texts: Sequence[str], tokenizer: Any, *, length: int) -> HeldOut:
    """Tokenize a domain's texts, in windows of `length` tokens at most."""
    windows = [window for window in cut(texts, tokenizer, length) if len(window) > 1]
    if not windows:
        raise RecipeError("there is no held-out text to score gates with; give each domain some")
    nbytes = sum(len(tokenizer.decode(window[1:]).encode()) for window in windows)
    return HeldOut(tuple(_batches(windows)), nbytes, sum(len(window) - 1 for window in windows))


def _batches(windows: Sequence[list[int]]) -> Iterator[Tensor]:
    """Windows of one length go together, so that there are no pads."""
    by_length: dict[int, list[list[int]]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    for length, alike in sorted(by_length.items()):
        yield from torch.tensor(alike).split(max(1, BATCH_TOKENS // length))


@torch.no_grad()
def score(model: nn.Module, text: HeldOut) -> Score:
    """Bits that a model needs for a text."""
    nats = 0.0
    device = next(model.parameters()).device
    for tokens in text.batches:
        tokens = tokens.to(device)  # copy: host -> device
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        nats += nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return Score(nats / math.log(2), text.nbytes, text.tokens)
