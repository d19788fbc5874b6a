"""The tokens a model is measured with: fixed beforehand, so that every run and every setting sees the same ones.

A model that generates freely may repeat one token for ever, which would raise every hit rate; and rounding would make
two settings generate different tokens.
"""

# N tokens of the passage, B sequences, S positions

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import transformers_moe_offload
from transformers_moe_offload.errors import ConfigError

SEED = 0

RANDOM_TOKENS = 16_384
HOUSE_CHARACTERS = 200_000
"""Some 70,000 tokens, more than is measured with; tokenizing all sources takes seconds."""

OFFSET = 997
"""Tokens between the beginnings of two sequences of a batch. A prime, so that text of regular structure is met in
different places."""


@dataclass(frozen=True)
class Passage:
    """Tokens, (N,) int64, from which sequences are taken; it begins anew where it ends."""

    tokens: Tensor
    is_text: bool
    """Random tokens otherwise."""
    source: str
    """Where the tokens come from, for the report."""

    def sequences(self, batch: int, length: int) -> Tensor:
        """(B, S) int64: sequences that begin at different places."""
        starts = torch.arange(batch).unsqueeze(1) * OFFSET
        return self.tokens[(starts + torch.arange(length)) % len(self.tokens)]


def passage_for(model: Any, name: str, **origin: Any) -> Passage:
    """The house text, or random tokens for a model without a tokenizer. `origin` are keywords of `from_pretrained`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **origin)
        return text_passage(tokenizer, house_text(), "the package's sources")
    except (OSError, ValueError):  # no tokenizer, or the empty one that Transformers makes up where files are missing
        ends = model.generation_config.eos_token_id
        avoid = frozenset(ends if isinstance(ends, list) else [ends])
        return random_passage(model.config.get_text_config().vocab_size, avoid)


def random_passage(vocab: int, avoid: frozenset[int] = frozenset()) -> Passage:
    """Uniform tokens for a model that has no tokenizer, without those that would end a sequence."""
    allowed = torch.tensor([token for token in range(vocab) if token not in avoid])
    chosen = torch.randint(len(allowed), (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(SEED))
    return Passage(allowed[chosen], is_text=False, source=f"random tokens, seed {SEED}")


def text_passage(tokenizer: Any, text: str, source: str) -> Passage:
    """A text, as the model's tokenizer splits it."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if not len(tokens):
        raise ConfigError(f"{source} has no text in it: there is nothing to measure with")
    return Passage(tokens, is_text=True, source=source)


def house_text() -> str:
    """A text that is at hand wherever the package is: the beginning of its own sources."""
    folder = Path(transformers_moe_offload.__file__).parent
    sources = (path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
    return "\n".join(sources)[:HOUSE_CHARACTERS]
