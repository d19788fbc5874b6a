"""Ctrl-C stops an answer between two tokens, and leaves the cache and the command usable."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from transformers_moe_offload.cli.answer import Interruption

pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_the_first_interrupt_is_noted_and_the_second_is_raised():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with Interruption() as interruption:
        assert interruption(tokens, None).tolist() == [False, False]
        signal.raise_signal(signal.SIGINT)
        assert interruption(tokens, None).tolist() == [True, True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_afterwards_ctrl_c_is_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def listen_to_ctrl_c() -> None:
    """As in the foreground of a shell. These tests may have been started in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=listen_to_ctrl_c,
        )
        os.close(slave)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Everything up to and including `text`, less what is colour and cursor movement."""
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} after {seconds} s, but {self._unread!r}"
            self._unread += os.read(self._master, 65536).decode(errors="replace")
            self._unread = ESCAPES.sub("", self._unread)
        seen, _, self._unread = self._unread.partition(text)
        return seen + text

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_until_it_leaves(self) -> int:
        """The exit code. A signal that comes between a prompt and the wait for input is only seen with the next key,
        so press again, as a person would."""
        for _ in range(5):
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=15)  # not sooner: a second interrupt would disturb the leaving
        raise AssertionError("still at its prompt after 5 interrupts")

    def close(self) -> None:
        os.close(self._master)
        self.process.kill()
        self.process.wait()


def test_ctrl_c_stops_an_answer_and_the_next_one_works(tiny_moe):
    command = [sys.executable, "-c", "from moe_offload_cli.main import app; app()"]
    terminal = Terminal(*command, "chat", str(tiny_moe), "--cache-budget", "25%", "--max-new-tokens", "100000")
    try:
        assert "32 of 128 experts fit into the cache" in terminal.wait_for("> ")
        terminal.type("The file\n")
        terminal.wait_for("hit rate")  # the status line: tokens are coming
        terminal.interrupt()
        terminal.wait_for("MiB read\r\n> ")  # the summary and the next prompt
        terminal.type("import os\n")
        terminal.wait_for("hit rate")
        terminal.interrupt()
        terminal.wait_for("MiB read\r\n> ")
        assert terminal.interrupt_until_it_leaves() == 0
    finally:
        terminal.close()
