"""Generate one answer, and show it token by token, until it ends or Ctrl-C stops it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from transformers_moe_offload.cli.display import Display, Meter, make_display


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None leaves a value to the model's generation config."""

    max_new_tokens: int
    temperature: float | None
    top_p: float | None

    def options(self) -> dict[str, Any]:
        """Keywords for `generate`; a temperature of 0 stands for greedy choice."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        chosen = {"temperature": self.temperature, "top_p": self.top_p}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return options | chosen | ({"do_sample": True} if chosen else {})


def generate(
    model: Any, tokenizer: Any, inputs: dict[str, Any], sampling: Sampling, criterion: StoppingCriteria, **options: Any
) -> Tensor:
    """The tokens that the model generates from the inputs, after theirs."""
    tokens: Tensor = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        **sampling.options(),
        **options,
        stopping_criteria=StoppingCriteriaList([criterion]),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokens


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt."""

    text: str
    was_stopped: bool
    """Whether Ctrl-C ended it."""


def answer(model: Any, tokenizer: Any, inputs: dict[str, Any], sampling: Sampling) -> Answer:
    """Generate an answer to the inputs, and show it meanwhile."""
    meter, display = Meter(model.moe_offload), make_display()
    try:
        with Interruption() as interruption:
            streamer = _Streamer(tokenizer, display, meter)
            tokens = generate(model, tokenizer, inputs, sampling, interruption, streamer=streamer)
    finally:
        display.close(meter.summary())
    new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
    return Answer(tokenizer.decode(new_tokens, skip_special_tokens=True), interruption.happened)


class Interruption(StoppingCriteria):
    """Listens for Ctrl-C inside its `with` block, and is the criterion that stops `generate` after the token.

    A `KeyboardInterrupt` can occur between any two lines, also inside the cache's bookkeeping. So the first Ctrl-C only
    sets a flag, which `generate` checks after each token. The second one is an ordinary interrupt.
    """

    def __init__(self, after_token: Callable[[], object] = lambda: None) -> None:
        """`after_token` is called after each token."""
        self.happened = False
        self._after_token = after_token
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
        self._after_token()
        return torch.full((len(input_ids),), self.happened, dtype=torch.bool, device=input_ids.device)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.happened:
            raise KeyboardInterrupt
        self.happened = True


class _Streamer(TextStreamer):
    """Hands whole words to the display and counts tokens."""

    def __init__(self, tokenizer: Any, display: Display, meter: Meter) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._display = display
        self._meter = meter

    def put(self, value: Tensor) -> None:
        """Take the prompt at first, then one token at a time: value (1, T) or (1,) int64."""
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not is_prompt:
            self._meter.count_token()
            self._display.status(self._meter.summary())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show decoded text."""
        self._display.write(text)
