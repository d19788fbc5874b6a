"""Text as batches of token windows, with masks of the tokens that are counted.

Shorter windows are padded at the end: later tokens change no hidden state of a causal model, so no attention mask is
needed, and pads are never counted.
"""

# B windows, T tokens in each, E experts

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from transformers_moe_offload.builder.texts.expert_texts import Texts, read_dataset
from transformers_moe_offload.errors import RecipeError

logger = logging.getLogger(__name__)

MAX_WINDOW_TOKENS = 512
"""The cost of attention grows with the square of it; prompts and paragraphs are shorter."""

BATCH_TOKENS = 4096
"""Enough rows for a matrix product to run at full speed; the activations of a 7B model's block take 250 MB with it."""

SAMPLED_TOKENS = 512
"""Hidden states that are kept of each expert, to measure entropies with: shares of the maximal entropy deviate by less
than 0.5, so that the mean of 512 is within 0.02 of the mean of all."""

FEW_TOKENS = 1000
"""Below this, gates are worse than they could be: in a study at a small size, ridge from 160 tokens an expert lost to
the dense base, and from 2,000 beat every other mode."""


@dataclass(frozen=True)
class Batch:
    """Windows that go through the model together."""

    tokens: Tensor
    """(B, T) int64."""
    lists: Tensor
    """(B,) int64: each window's list of texts; 2 e for the texts of expert e, 2 e + 1 for its negative prompts."""
    counted: Tensor
    """(B, T) bool: False for pads, and for the first token where `skip_bos` leaves it out."""
    sampled: Tensor
    """(B, T) bool: tokens whose hidden states are kept."""

    attention_mask = None


@dataclass(frozen=True)
class Windows:
    """All batches, and how many tokens are counted in each list of texts."""

    batches: tuple[Batch, ...]
    counts: tuple[int, ...]
    """By list: 2 E."""

    @property
    def sampled(self) -> int:
        """How many tokens' hidden states are kept."""
        return int(sum(batch.sampled.sum() for batch in self.batches))


def window_length(config: PreTrainedConfig) -> int:
    """Most tokens that are run at once."""
    return min(getattr(config, "max_position_embeddings", None) or MAX_WINDOW_TOKENS, MAX_WINDOW_TOKENS)


def windows_of(texts: Sequence[Texts], tokenizer: Any, *, length: int, skip_bos: bool) -> Windows:
    """Tokenize the experts' texts, in windows of `length` tokens at most."""
    if tokenizer is None:
        raise RecipeError("the base model has no tokenizer, which text needs; add its files to the base model's folder")
    windows: list[_Window] = []
    counts: list[int] = []
    for expert in texts:
        for negative in (False, True):
            source = cut(expert.negative, tokenizer, length) if negative else _positive(expert, tokenizer, length)
            count = 0
            for tokens in source:
                windows.append(_Window(len(counts), count, tokens))
                count += len(tokens) - skip_bos
            if count == 0 and (expert.negative if negative else not expert.is_empty):
                raise RecipeError(
                    f"the {'negative_prompts' if negative else 'texts'} of expert {expert.name!r} leave no token to "
                    f"calibrate with; give it longer ones" + (", or set gate.skip_bos to false" if skip_bos else "")
                )
            counts.append(count)
    for expert, count in zip(texts, counts[::2], strict=True):
        if count < FEW_TOKENS and not expert.is_empty:
            logger.warning(
                "Expert %r has %d tokens to calibrate its gate with; %d or more make a better one (positive_prompts, "
                "dataset).",
                expert.name,
                count,
                FEW_TOKENS,
            )
    return Windows(tuple(_batches(windows, counts, skip_bos)), tuple(counts))


def _positive(expert: Texts, tokenizer: Any, length: int) -> Iterator[list[int]]:
    yield from cut(expert.positive, tokenizer, length)
    if expert.dataset is not None:
        left = expert.dataset.max_tokens
        for window in cut(read_dataset(expert.dataset), tokenizer, length):
            yield window[:left]
            left -= len(window)
            if left <= 0:
                return


def cut(texts: Any, tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Windows of each text; all begin with the beginning-of-text token, where the tokenizer has one."""
    bos = tokenizer.bos_token_id
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if bos is not None and tokens[:1] == [bos]:
            tokens = tokens[1:]
        first = [] if bos is None else [bos]
        step = length - len(first)
        for start in range(0, len(tokens), step):
            yield first + tokens[start : start + step]


class _Window(NamedTuple):
    number: int
    """Number of its list of texts."""
    first: int
    """Tokens of the list that are counted before it."""
    tokens: list[int]


def _batches(windows: Sequence[_Window], counts: Sequence[int], skip_bos: bool) -> Iterator[Batch]:
    order = sorted(windows, key=lambda window: len(window.tokens))
    while order:
        longest = len(order[-1].tokens)
        size = max(1, BATCH_TOKENS // longest)
        taken, order = order[-size:], order[:-size]
        tokens = torch.zeros(len(taken), longest, dtype=torch.int64)
        counted, sampled = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
        for row, window in enumerate(taken):
            end = len(window.tokens)
            tokens[row, :end] = torch.tensor(window.tokens)
            counted[row, int(skip_bos) : end] = True
            if window.number % 2 == 0:
                places = window.first + torch.arange(end - skip_bos)
                sampled[row, int(skip_bos) : end] = _is_sampled(places, counts[window.number])
        yield Batch(tokens, torch.tensor([window.number for window in taken]), counted, sampled)


def _is_sampled(places: Tensor, count: int) -> Tensor:
    """Which of `count` tokens are kept, evenly spread: places (N,) int64 -> (N,) bool."""
    if count <= SAMPLED_TOKENS:
        return torch.ones_like(places, dtype=torch.bool)
    return (places + 1) * SAMPLED_TOKENS // count > places * SAMPLED_TOKENS // count


def random_windows(num_experts: int, vocab_size: int, seed: int) -> Windows:
    """Tokens drawn at random, counted as the first expert's texts: for gates that need typical hidden states and have
    no text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (8, 65), generator=generator)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    lists = torch.zeros(len(tokens), dtype=torch.int64)
    batch = Batch(tokens, lists, counted, counted)
    return Windows((batch,), (int(counted.sum()), *[0] * (2 * num_experts - 1)))
