"""Train the routers of a mixture, and nothing else, for a few steps on text of every expert's domain."""

# D domains, T tokens of a window

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload import training

LENGTH = 128
"""Tokens of a window."""


@dataclass(frozen=True)
class RouterTraining:
    """Adam on next-token loss; a step takes one window of each domain, and all of them count the same."""

    batches: tuple[Tensor, ...]
    """One (D, T) int64 for each step."""
    learning_rate: float = 3e-3
    """Of the first step; it falls to zero in a straight line. The best of 1e-3, 3e-3 and 1e-2 for noise, random and
    ridge gates on other training text."""

    @classmethod
    def on(cls, texts: Mapping[str, Sequence[str]], tokenizer: Any, steps: int) -> RouterTraining:
        """Texts by domain, one after another in windows, from the start again where they are not enough."""
        windows = [_windows(some, tokenizer) for some in texts.values()]
        rows = zip(*(cycle(domain) for domain in windows), strict=True)
        return cls(tuple(torch.stack(row) for row in islice(rows, steps)))

    def __call__(self, model: Any) -> None:
        """Train the routers where they are; the model is left to be scored."""
        names = training.set_trainable(model, "router")
        optimizer = torch.optim.Adam([model.get_parameter(name) for name in names], lr=self.learning_rate)
        steps = len(self.batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for tokens in self.batches:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.requires_grad_(False)

    def __str__(self) -> str:
        """For the result's facts."""
        domains, length = self.batches[0].shape
        return (
            f"{len(self.batches)} steps of Adam, each on {domains} windows of {length} tokens, one of each domain's "
            f"calibration text; learning rate {self.learning_rate:g} falling to 0; next-token loss alone"
        )


def _windows(texts: Sequence[str], tokenizer: Any) -> list[Tensor]:
    """Whole windows (T,) of a domain's texts."""
    ids = [token for text in texts for token in tokenizer(text, verbose=False).input_ids]
    return list(torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH))
