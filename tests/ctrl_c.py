"""Ctrl-C at a chosen place: at any instruction of ours at which the interpreter could have looked for signals.

Python runs signal handlers in the main thread between two instructions. Here a trace function raises instead, at the
n-th of them in files of ours. Left out are the few instructions that end a `with` block, up to the call of `__exit__`,
and those that do nothing: CPython never looks for signals there (`Python/ceval.c`, 3.11: it does where a function
begins, where a loop goes round, and after calls), and an exception there would leave any lock locked, since the
compiler counts them to no block.
"""

import dis
import faulthandler
import sys
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import transformers_moe_offload

PACKAGE = Path(transformers_moe_offload.__file__).parent


class Interrupts:
    """Counts instructions in some folders of the package, and raises `KeyboardInterrupt` at one of them.

    `at` is a number, or nothing to count only. Of each instruction only the first `repeats` times are counted: what a
    loop does the third time it did before.
    """

    def __init__(self, folders, at=None, repeats=2):
        self._files = tuple(str(PACKAGE / folder) for folder in folders)
        self._at = at
        self._repeats = repeats
        self._counters = {}
        """By the function's code, which is alive as long as the package is."""
        self.count = 0
        self.place = None
        """Where it was raised."""

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._called)

    def __exit__(self, *error):
        sys.settrace(self._before)

    def _called(self, frame, event, argument):
        code = frame.f_code
        counter = self._counters.get(id(code), self)
        if counter is self:
            is_ours = code.co_filename.startswith(self._files)
            counter = self._counters[id(code)] = self._counter(code) if is_ours else None
        if counter is not None:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return counter

    def _counter(self, code):
        """Counts instructions of a function: what is called before each of them."""
        left = [0 if offset in _never(code) else self._repeats for offset in range(len(code.co_code))]

        def executed(frame, event, argument):
            if event == "opcode" and left[frame.f_lasti]:
                left[frame.f_lasti] -= 1
                self.count += 1
                if self.count == self._at:
                    self.place = f"{code.co_filename}:{frame.f_lineno}, instruction {frame.f_lasti}"
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return executed

        return executed


@cache
def _never(code):
    """Offsets of the instructions between the end of a `with` block and the call of `__exit__`, and of idle ones."""
    instructions = list(dis.get_instructions(code))
    found = {one.offset for one in instructions if one.opname == "NOP"}
    for i in range(len(instructions) - 3):
        nones, call = instructions[i : i + 3], instructions[i + 3]
        if any(one.opname != "LOAD_CONST" or one.argval is not None for one in nones):
            continue
        if call.opname in ("PRECALL", "CALL") and call.arg == 2:
            found.update(one.offset for one in instructions[i : i + 5])
            if instructions[i - 1].opname == "SWAP":  # what a `return` inside of the block returns is put aside
                found.add(instructions[i - 1].offset)
    return found


@contextmanager
def a_hang_is_a_failure(seconds=120):
    """What hangs in C cannot be interrupted: the process tells where it is, and ends."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def in_another_thread(work):
    """Do work in a thread that was not interrupted; returns what it returns."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "the thread failed, or waits for something that the interrupted one has left locked"
    return found[0]
