"""Generate one answer, and show it token by token, until it ends or Ctrl-C stops it, with its speed and hit rate.

On a terminal the text grows above a status line that keeps up with it. Anywhere else the text goes to stdout as it
comes and one summary line to stderr, so that a redirected stdout holds the answers and nothing else.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from transformers_moe_offload.hf.model.handle import OffloadRuntime


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


class PlainDisplay:
    """Text to stdout, summary to stderr."""

    def __init__(self) -> None:
        self._ends_a_line = True

    def write(self, text: str) -> None:
        """Pass the text on at once."""
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._ends_a_line = text.endswith("\n")

    def status(self, line: str) -> None:
        """Do nothing: lines that are written cannot be redrawn."""

    def close(self, summary: str) -> None:
        """End the last line, and sum up."""
        if not self._ends_a_line:
            self.write("\n")
        print(f"[{summary}]", file=sys.stderr, flush=True)


class LiveDisplay:
    """The line being written and the status below it are redrawn; finished lines scroll away above them.

    Only two lines are ever redrawn, so an answer may be longer than the screen.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = ""
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._live.start()

    def write(self, text: str) -> None:
        """Add to the last line; what is above it is final."""
        text = text.replace("\x1b", "\N{SYMBOL FOR ESCAPE}")  # a model must not be able to steer the terminal
        *finished, self._line = (self._line + text).split("\n")
        *wrapped, last = Text(self._line).wrap(self._console, self._console.width) or [Text()]
        if wrapped:
            finished += [line.plain for line in wrapped]
            self._line = last.plain
        for line in finished:
            self._console.print(Text(line))

    def status(self, line: str) -> None:
        """Redraw the last line and the status line."""
        status = Text(line, style="dim", no_wrap=True, overflow="ellipsis")
        self._live.update(Group(Text(self._line), status), refresh=True)

    def close(self, summary: str) -> None:
        """Print the end of the answer and the summary for good."""
        self._live.stop()
        if self._line:
            self._console.print(Text(self._line))
        self._console.print(Text(summary, style="dim"))


Display = PlainDisplay | LiveDisplay
"""Shows one answer: `write` takes more of it, `status` speed and hit rate so far, `close` ends it, whole or stopped."""


def make_display() -> Display:
    """The display for a terminal, or for any other stdout."""
    console = Console(highlight=False)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay()


class Meter:
    """Measures from its creation to each call of `summary`."""

    def __init__(self, runtime: OffloadRuntime) -> None:
        self._runtime = runtime
        runtime.reset_stats()
        self._started = time.perf_counter()
        self._first_s = 0.0
        self._last_s = 0.0
        self.num_tokens = 0

    def count_token(self) -> None:
        """One more token has been generated."""
        self._last_s = time.perf_counter() - self._started
        self._first_s = self._first_s or self._last_s
        self.num_tokens += 1

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first one, which also took reading the prompt; 0 before the second."""
        decode_s = self._last_s - self._first_s
        return (self.num_tokens - 1) / decode_s if decode_s else 0.0

    def summary(self) -> str:
        """One line: tokens, speed, hit rate, bytes read."""
        stats = self._runtime.stats()
        return (
            f"{self.num_tokens} tokens, {self.tokens_per_s:.1f} tokens/s, first after {self._first_s:.1f} s, "
            f"hit rate {stats.hit_rate:.1%}, {stats.disk_bytes / 2**20:.1f} MiB read"
        )
