"""Interrupt a generation by Ctrl-C, again and again: no answer may ever hang, fail for good, or be another one.

    python -m benchmarks.reliability.interrupts  # 10,000 signals, on one thread and on four
    python -m benchmarks.reliability.interrupts --signals 200 --threads 4

Signals are real ones and reach the main thread at random moments of its generations, while other threads generate, too.
After every few signals the main thread's answer, and at the end every thread's, is compared with the plain model's.
"""

from __future__ import annotations

import faulthandler
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks import RESULTS, TINY_MOE
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.reliability.soak import READINGS, Question, _answer, _questions
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table

MOST_PROMPT, MOST_NEW = 24, 4
"""Tokens of the questions: an interrupt in the third forward finds nothing that it would not find in the twelfth."""

CHECK_EVERY = 10
"""Signals between two answers of the main thread that are waited for and compared."""

TELL_EVERY = 500
"""Signals between two lines that say how far it is."""

LONGEST_S = 120
"""Without a signal, before this counts as a hang: the process tells where each thread is, and ends."""


@dataclass
class Ledger:
    """What was done, and what went wrong."""

    signals: int = 0
    lost: int = 0
    """Signals that interrupted nothing: an exception in a finalizer or a callback of C code is dropped by Python."""
    checked: int = 0
    beside: int = 0
    """Answers of the other threads."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def main(
    signals: Annotated[int, typer.Option(min=1, help="For each number of threads and way of reading.")] = 10_000,
    threads: Annotated[list[int] | None, typer.Option(help="Threads that generate; by default 1, then 4.")] = None,
    reading: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(READINGS)}; by default all.")] = None,
    model: Annotated[Path, typer.Option(help="A folder with a checkpoint.")] = TINY_MOE,
    seed: Annotated[int, typer.Option(help="Of prompts and moments.")] = 0,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Interrupt generations; the exit code says whether everything held."""
    questions = _questions(model, seed, most_prompt=MOST_PROMPT, most_new=MOST_NEW)
    ledgers = {
        (number, way): interrupted(model, questions, READINGS[way], number, signals, seed)
        for number in threads or (1, 4)
        for way in reading or READINGS
    }
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(model),
        "facts": {"model": model.name, "setting": f"cache_budget='25%', arithmetic='exact', seed {seed}"},
        "runs": [{"threads": number, "reading": way} | vars(ledger) for (number, way), ledger in ledgers.items()],
    }
    found = verdicts(result)
    show(write(results, "interrupts", result), result, [table(result)], found)
    raise typer.Exit(0 if all(is_kept for _, is_kept in found) else 1)


def interrupted(
    folder: Path, questions: list[Question], reading: dict[str, Any], num_threads: int, num_signals: int, seed: int
) -> Ledger:
    """Generate in so many threads, the main one among them, which gets so many signals."""
    config = OffloadConfig(cache_budget="25%", arithmetic="exact", **reading)
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
    ledger, draw, began = Ledger(), random.Random(seed), time.monotonic()
    # A shell has what it starts in the background ignore this signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    sender, is_over = _Sender(seed), threading.Event()
    others = [
        threading.Thread(target=_generate_beside, args=(model, questions, ledger, is_over, seed + n), daemon=True)
        for n in range(1, num_threads)
    ]
    for thread in [sender, *others]:
        thread.start()
    try:
        while ledger.signals < num_signals:
            faulthandler.dump_traceback_later(LONGEST_S, exit=True)
            if not _is_interrupted(model, draw.choice(questions), sender):
                ledger.lost += 1
                continue
            ledger.signals += 1
            if ledger.signals % CHECK_EVERY == 0:
                _check(model, draw.choice(questions), ledger, "after an interrupt")
                ledger.checked += 1
            if ledger.signals % TELL_EVERY == 0:
                print(f"{ledger.signals:,} signals, {len(ledger.wrong)} wrong answers", file=sys.stderr)
    finally:
        sender.is_over = True
        is_over.set()
        for thread in others:
            thread.join()
        signal.signal(signal.SIGINT, handler)
    last = threading.Thread(target=_check_all, args=(model, questions, ledger))
    last.start()
    last.join()
    _check_all(model, questions, ledger)
    faulthandler.cancel_dump_traceback_later()
    ledger.seconds = time.monotonic() - began
    return ledger


class _Sender(threading.Thread):
    """Sends the main thread a signal, once for each time that it is asked to, after a random time.

    Asked and answered by plain numbers: what synchronizes threads is not to be interrupted.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(daemon=True)
        self.asked = self.sent = 0
        self.longest = 0.02
        """Seconds that an answer takes, about."""
        self.is_over = False
        self._draw = random.Random(seed)

    def run(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self.is_over:
            if self.sent == self.asked:
                time.sleep(0.0002)
                continue
            time.sleep(self._draw.random() * self.longest)
            signal.pthread_kill(main, signal.SIGINT)
            self.sent += 1


def _is_interrupted(model: Any, question: Question, sender: _Sender) -> bool:
    """Answer until a signal has been here, or until one that was sent must have been; returns whether it was."""
    try:
        sender.asked += 1
        was_sent = False
        while not was_sent:
            was_sent, began = sender.sent == sender.asked, time.perf_counter()
            _answer(model, question.prompt, question.new_tokens)
            sender.longest += (time.perf_counter() - began - sender.longest) / 16
    except KeyboardInterrupt:
        while sender.sent < sender.asked:  # it has only just to note that
            time.sleep(0.0002)
        return True
    return False


def _check(model: Any, question: Question, ledger: Ledger, when: str) -> None:
    try:
        answer = _answer(model, question.prompt, question.new_tokens)
        wrong = "" if torch.equal(answer, question.expected) else "other tokens than the plain model's"
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        ledger.wrong.append(f"{when}: {wrong}")


def _check_all(model: Any, questions: list[Question], ledger: Ledger) -> None:
    for question in questions:
        _check(model, question, ledger, f"at the end, in {threading.current_thread().name}")


def _generate_beside(
    model: Any, questions: list[Question], ledger: Ledger, is_over: threading.Event, seed: int
) -> None:
    draw = random.Random(seed)
    while not is_over.is_set():
        _check(model, draw.choice(questions), ledger, "beside an interrupted thread")
        ledger.beside += 1


def table(result: dict[str, Any]) -> Table:
    """What was done."""
    rows = [
        [f"{run['threads']}, {run['reading']}"]
        + [f"{run[what]:,}" for what in ("signals", "lost", "checked", "beside")]
        + [f"{run['seconds']:.0f}"]
        for run in result["runs"]
    ]
    return Table("interrupts", ["threads", "signals", "lost", "answers compared", "of other threads", "seconds"], rows)


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """What must hold; that nothing hangs shows in that there is a result."""
    wrong = [one for run in result["runs"] for one in run["wrong"]]
    first = f"; the first: {wrong[0]}" if wrong else ""
    answers = sum(run["checked"] + run["beside"] for run in result["runs"])
    return [(f"same tokens as the plain model: {len(wrong)} of {answers:,} differ{first}", answers > 0 and not wrong)]


if __name__ == "__main__":
    if sys.platform == "win32":
        sys.exit("interrupts.py sends signals to a thread, which Windows does not know")
    typer.run(main)
