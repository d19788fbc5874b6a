"""Answers arrive whole on a terminal, and bare in a file."""

import io
import re

import pytest
from rich.console import Console

from transformers_moe_offload.cli.answer import LiveDisplay, PlainDisplay


def on_terminal(pieces: list[str], width: int = 30) -> list[str]:
    """What stands on a terminal in the end, line by line."""
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=width, height=4, highlight=False))
    for piece in pieces:
        display.write(piece)
        display.status("12 tokens, 3.4 tokens/s and more than fits")
    display.close("that was it")
    return screen(stream.getvalue())


def screen(output: str) -> list[str]:
    """A terminal that knows what rich asks of one: carriage return, erase line, cursor up, new line."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.endswith("A") and token.startswith("\x1b"):
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith("\x1b") and token != "\r":
            lines[row] += token
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_keeps_the_answer_and_the_summary():
    assert on_terminal(["Hello ", "there", ".\nBye", "."]) == ["Hello there.", "Bye.", "that was it"]


def test_an_answer_longer_than_the_screen_is_written_once():
    words = [f"word{i} " for i in range(60)]
    shown = on_terminal(words)
    assert " ".join(shown[:-1]).split() == "".join(words).split()
    assert all(len(line) <= 30 for line in shown)


def test_a_model_cannot_steer_the_terminal():
    assert on_terminal(["\x1b[2J\x1b]0;owned\x07"])[0].startswith("␛[2J␛]0;owned")


@pytest.mark.parametrize("pieces", [["Hello ", "there"], ["Hello there\n"]])
def test_elsewhere_stdout_has_the_answer_and_stderr_the_summary(capsys, pieces):
    display = PlainDisplay()
    for piece in pieces:
        display.write(piece)
        display.status("12 tokens")
    display.close("that was it")
    assert capsys.readouterr() == ("Hello there\n", "[that was it]\n")
