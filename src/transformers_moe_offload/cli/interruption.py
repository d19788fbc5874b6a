"""Ctrl-C while an answer is being generated: finish the token, then stop.

A `KeyboardInterrupt` can occur between any two lines, also inside the cache's bookkeeping. So the first Ctrl-C only
sets a flag, which `generate` checks after each token. The second one is an ordinary interrupt, which does not wait for
the token.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Interruption(StoppingCriteria):
    """Listens for Ctrl-C inside its `with` block, and is the criterion that stops `generate`."""

    def __init__(self) -> None:
        self.happened = False
        self._previous: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python delivers no signals
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether to stop, for each sequence: input_ids (B, T) int64 -> (B,) bool."""
        return torch.full((len(input_ids),), self.happened, dtype=torch.bool, device=input_ids.device)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.happened:
            raise KeyboardInterrupt
        self.happened = True
