"""Run damaged and hostile inputs against their readers: each is read, or refused with an error of ours, within bounds.

A format is a module `test_*.py` beside this one with two functions:

    def cases(rng: random.Random) -> Iterator[Case]    # inputs without end; Case is whatever `run` takes
    def run(case: Case) -> object                      # reads one; AssertionError where what it read cannot be right

A case fails if it raises anything but a `MoeOffloadError`, if its message is longer than `MAX_MESSAGE` characters or
cannot be printed, or if it takes more than `MAX_CPU_S` of CPU time or `MAX_BYTES` of memory. Cases run in forked
children, a batch in each, so that what hangs or is killed is one more failure. By hand, any number of them:

    PYTHONPATH=src:tests python -m fuzz.fuzzing --cases 200000 --seed 0 --report report.md
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import pickle
import platform
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import distributions, version
from pathlib import Path
from reprlib import Repr
from types import ModuleType
from typing import Any

import torch

from forked import with_locks_of_its_own
from transformers_moe_offload.errors import MoeOffloadError

MAX_CPU_S = 2.0
MAX_BYTES = 500 * 2**20
MAX_MESSAGE = 1500
BATCH = 250
"""Cases of one child."""

_BRIEF = Repr()
_BRIEF.maxstring = _BRIEF.maxother = 600
_BRIEF.maxlevel = 5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case."""

    batch: int
    """With the format's name and the seed, these two find the case again."""
    number: int
    result: str
    """`read`, the name of an error of ours, or what went wrong."""
    is_fault: bool
    cpu_s: float
    nbytes: int
    """Most resident memory while it ran, beyond that before."""
    case: str = ""
    details: str = ""


@dataclass
class Report:
    """What became of the cases of one format."""

    name: str
    seed: int
    results: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0
    slowest: Outcome | None = None
    largest: Outcome | None = None
    faults: list[Outcome] = field(default_factory=list)

    @property
    def num_cases(self) -> int:
        return sum(self.results.values())

    def add(self, outcome: Outcome) -> None:
        self.results[outcome.result] += 1
        self.cpu_s += outcome.cpu_s
        if outcome.is_fault:
            self.faults.append(outcome)
        if self.slowest is None or outcome.cpu_s > self.slowest.cpu_s:
            self.slowest = outcome
        if self.largest is None or outcome.nbytes > self.largest.nbytes:
            self.largest = outcome


def formats() -> dict[str, ModuleType]:
    """Every format there is, by its name: `headers` is `test_headers.py`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    modules = {name.removeprefix("test_"): importlib.import_module(f"fuzz.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "cases") and hasattr(module, "run")}


def fuzzed(module: ModuleType, *, num_cases: int, seed: int = 0) -> Report:
    """Run this many cases of a format."""
    report = Report(module.__name__.rpartition("test_")[2], seed)
    next(the_cases(module, seed, 0))  # what all cases share is made here, not by each child
    for batch, start in enumerate(range(0, num_cases, BATCH)):
        size, done = min(BATCH, num_cases - start), 0
        while done < size:
            for outcome in _in_a_child(module, seed, batch, done, size):
                report.add(outcome)
                done = outcome.number + 1
    return report


def expect_no_faults(module: ModuleType, *, num_cases: int, seed: int = 0) -> None:
    """The quick run of the ordinary suite."""
    report = fuzzed(module, num_cases=num_cases, seed=seed)
    assert not report.faults, "\n\n".join(f"{one.result}: {one.case}\n{one.details}" for one in report.faults[:3])
    assert report.num_cases == num_cases


def the_cases(module: ModuleType, seed: int, batch: int) -> Any:
    """The cases of one batch, the same at every call."""
    return module.cases(random.Random(f"{module.__name__}/{seed}/{batch}"))


def _in_a_child(module: ModuleType, seed: int, batch: int, first: int, end: int) -> list[Outcome]:
    """The outcomes of these cases, or of as many as the child lived for, and of the one that it died of."""
    readable, writable = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            with os.fdopen(writable, "wb", buffering=0) as stream:
                with_locks_of_its_own(_run_all, module, seed, batch, first, end, stream)
        finally:
            os._exit(0)
    os.close(writable)
    outcomes = []
    with os.fdopen(readable, "rb") as stream:
        while True:
            try:
                outcomes.append(pickle.load(stream))
            except EOFError:
                break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    number = outcomes[-1].number + 1 if outcomes else first
    if number < end:
        case = next(itertools.islice(the_cases(module, seed, batch), number, None))
        killed = f"killed by signal {-status}" if status < 0 else f"left with status {status}"
        outcomes.append(
            Outcome(batch=batch, number=number, result=killed, is_fault=True, cpu_s=0, nbytes=0, case=_BRIEF.repr(case))
        )
    return outcomes


def _run_all(module: ModuleType, seed: int, batch: int, first: int, end: int, stream: Any) -> None:
    torch.set_num_threads(1)  # the threads of the parent's pool are not in this process
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGPROF, _too_long)
    data = _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (data + 2 * MAX_BYTES, resource.RLIM_INFINITY))
    for number, case in enumerate(itertools.islice(the_cases(module, seed, batch), end)):
        if number >= first:
            # Its handler cannot interrupt a long call into C; this limit can.
            used = time.process_time()
            resource.setrlimit(resource.RLIMIT_CPU, (int(used + 5 * MAX_CPU_S), resource.RLIM_INFINITY))
            stream.write(pickle.dumps(_outcome(module, batch, number, case)))


class _TooLongError(BaseException):
    """The case has used up its time; no reader takes it for one of its own errors."""


def _too_long(*args: object) -> None:
    raise _TooLongError


def _outcome(module: ModuleType, batch: int, number: int, case: Any) -> Outcome:
    before = _reset_peak()
    start = time.process_time()
    details, is_fault = "", False
    try:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
        try:
            module.run(case)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        result = "read"
    except MoeOffloadError as error:
        result = type(error).__name__
        if not _is_printable(str(error)):
            result, details, is_fault = f"{result} that cannot be printed", ascii(str(error)), True
        elif len(str(error)) > MAX_MESSAGE:
            result, details, is_fault = f"{result} of {len(str(error)):,} characters", str(error)[:MAX_MESSAGE], True
    except BaseException as error:
        result, is_fault = type(error).__name__.strip("_"), True
        details = "".join(traceback.format_exception(error, limit=-12, chain=False))[-4000:]
    cpu_s = time.process_time() - start
    nbytes = max(0, _status("VmHWM") - before)
    if not is_fault and cpu_s > MAX_CPU_S:
        result, is_fault = f"{result}, too slow", True
    if not is_fault and nbytes > MAX_BYTES:
        result, is_fault = f"{result}, too large", True
    return Outcome(
        batch=batch,
        number=number,
        result=result,
        is_fault=is_fault,
        cpu_s=cpu_s,
        nbytes=nbytes,
        case=_BRIEF.repr(case) if is_fault or cpu_s > 0.05 or nbytes > 2**22 else "",
        details=details,
    )


def _is_printable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reset_peak() -> int:
    """Forget how much memory this process has had at most, and return how much it has."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """A number of bytes that the kernel tells of this process."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(f"{name}:"))


def as_markdown(reports: list[Report], seed: int) -> str:
    """The reports as a page."""
    total = sum(report.num_cases for report in reports)
    faults = sum(len(report.faults) for report in reports)
    lines = [
        "# Damaged and hostile files",
        "",
        f"{date.today()}, {_versions()}.",
        "",
        f"{total:,} cases, seed {seed}: {faults} faults. A case is a fault if it raises anything but an error of ours, "
        f"takes more than {MAX_CPU_S:g} s of CPU time or {MAX_BYTES // 2**20} MiB of memory, or has a message longer "
        f"than {MAX_MESSAGE:,} characters.",
        "",
        "| format | cases | read | refused | faults | CPU s | slowest case, s | most memory, MiB |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for one in reports:
        wrong = {outcome.result for outcome in one.faults}
        refused = ", ".join(f"{n:,} {name}" for name, n in one.results.most_common() if name not in {"read", *wrong})
        assert one.slowest is not None
        assert one.largest is not None
        lines.append(
            f"| {one.name} | {one.num_cases:,} | {one.results['read']:,} | {refused} | {len(one.faults)} "
            f"| {one.cpu_s:.1f} | {one.slowest.cpu_s:.2f} | {one.largest.nbytes / 2**20:.1f} |"
        )
    for one in reports:
        for outcome in one.faults[:20]:
            lines += ["", f"## {one.name}, batch {outcome.batch}, case {outcome.number}: {outcome.result}", ""]
            lines += ["```text", outcome.case, outcome.details.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _versions() -> str:
    """What reads the files."""
    names = ("transformers", "torch", "safetensors", "PyYAML", "numpy", "pyarrow")
    found = [f"{name} {version(name)}" for name in names if any(distributions(name=name))]
    return ", ".join([f"Python {platform.python_version()}", *found])


def as_json(reports: list[Report]) -> str:
    """The same for programs."""
    plain = [asdict(replace(one, results={})) | {"results": dict(one.results)} for one in reports]
    return json.dumps(plain, indent=2) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="of all formats together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of formats; by default all")
    parser.add_argument("--report", type=Path, help="a file; .json is for programs, anything else is Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: module for name, module in formats().items() if not options.only or name in options.only}
    reports = []
    for name, module in chosen.items():
        reports.append(fuzzed(module, num_cases=-(-options.cases // len(chosen)), seed=options.seed))
        print(f"{name}: {dict(reports[-1].results)}, {len(reports[-1].faults)} faults", file=sys.stderr, flush=True)
    is_json = options.report is not None and options.report.suffix == ".json"
    text = as_json(reports) if is_json else as_markdown(reports, options.seed)
    if options.report is None:
        print(text)
    else:
        options.report.write_text(text)
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(main())
