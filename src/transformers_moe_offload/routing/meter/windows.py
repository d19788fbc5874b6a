"""Texts, cut into windows that a model reads token by token, each from its beginning."""

# S tokens of a window

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.errors import ConfigError


def windows_of(texts: Sequence[Sequence[int] | Tensor], length: int, most: int) -> list[Tensor]:
    """Windows of at most `length` tokens, (S,) int64, S > 1, in which `most` tokens are predicted, or all that there
    are: as many of each text as of the others, evenly spread over it.

    Raises `ConfigError` for a text of fewer than two tokens.
    """
    if not texts:
        raise ConfigError("there is no text to measure with; pass one or more")
    found = []
    for number, text in enumerate(texts):
        ids = torch.as_tensor(text, dtype=torch.int64).reshape(-1)
        if len(ids) < 2:
            raise ConfigError(
                f"text {number} has {len(ids)} token{'s' * (len(ids) != 1)}, and nothing to predict in fewer than 2; "
                f"pass a longer one"
            )
        found.append([window for window in ids.split(length) if len(window) > 1])
    share, left = -(-most // len(found)), most
    chosen: list[Tensor] = []
    for windows in found:
        count = max(1, min(len(windows), -(-share // (length - 1))))
        for place in range(count):
            window = windows[place * len(windows) // count][: left + 1]
            if len(window) > 1:
                chosen.append(window)
                left -= len(window) - 1
    return chosen


def most_positions(model: Any) -> int | None:
    """How many positions a model has; None where its config does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None
