"""Time every step of a `generate` call without changing how it generates."""

# B sequences (or beams), V vocabulary, C candidates

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor

Restrict = Callable[[int, Tensor], Tensor]
"""Step and scores (B, V) -> the scores from which the next token is chosen."""


class StepClock(LogitsProcessor):
    """Called by `generate` after every forward: stops the clock, hands over to `between`, starts the clock again.

    `between` is given the step and its scores, (B, V); what it does is not part of any figure.
    """

    def __init__(
        self,
        restrict: Restrict = lambda step, scores: scores,
        between: Callable[[int, Tensor], None] = lambda step, scores: None,
    ) -> None:
        self.first_s = 0.0
        """From `start` to the scores of the first new token: reading the prompt."""
        self.step_s: list[float] = []
        """Seconds of each token after the first."""
        self._restrict = restrict
        self._between = between
        self._step = 0
        self._started = 0.0

    def start(self) -> None:
        """Start the clock: call it right before `generate`."""
        self._started = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V) -> scores under which the next token is chosen."""
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        elapsed_s = time.perf_counter() - self._started
        if self._step == 0:
            self.first_s = elapsed_s
        else:
            self.step_s.append(elapsed_s)
        self._between(self._step, scores)
        restricted = self._restrict(self._step, scores)
        self._step += 1
        self._started = time.perf_counter()
        return restricted


def laid_down(tokens: Tensor) -> Restrict:
    """Only the given token of each step can be chosen: tokens (B, S) int64."""

    def restrict(step: int, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, tokens[:, step : step + 1].to(scores.device), 0.0)

    return restrict


def among(candidates: Tensor) -> Restrict:
    """The model chooses among a few tokens of each step: candidates (S, C) int64, C at least twice the beams."""

    def restrict(step: int, scores: Tensor) -> Tensor:
        allowed = candidates[step].to(scores.device)
        left = torch.full_like(scores, -torch.inf)
        left[:, allowed] = scores[:, allowed]
        return left

    return restrict
