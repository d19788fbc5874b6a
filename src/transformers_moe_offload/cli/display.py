"""Show an answer while it is being generated, and measure speed and use of the cache.

On a terminal the text grows above a status line that keeps up with it. Anywhere else the text goes to stdout as it
comes and one summary line to stderr, so that a redirected stdout holds the answers and nothing else.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from transformers_moe_offload.hf.model.handle import OffloadRuntime


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
