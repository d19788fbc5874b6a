"""Work that is done in a process of its own: a function of a module, called with fields that pass as JSON both ways.

A process of its own, because what one row has allocated, mapped or warmed up must not show in another row's figures.
It is forked from one that has imported the package and done nothing else, since importing takes longer than many a row;
under a cap, with another interpreter or with a GPU it is started from nothing, as by hand:

    python -m benchmarks.harness.job benchmarks.builder.build:build '{"sources": ["..."], ...}' answer.json
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import CHECKOUT

if TYPE_CHECKING:
    from benchmarks.harness.cap import Cap

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""For jobs that compute on the CPU, whatever else there is."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

TAIL = 2000
"""Characters of a failed process's stderr that are kept."""


class JobFailedError(Exception):
    """The process ended without an answer; the message is the end of what it wrote to stderr."""


def run_job(
    work: str,
    job: dict[str, Any],
    num_threads: int | None,
    *,
    cap: Cap | None = None,
    python: str = sys.executable,
    variables: Mapping[str, str] = ON_CPU,
) -> Any:
    """Call `work`, a "module:function", with the fields of a job; `variables` are added to the process's environment.

    Under a `cap` if one is given, and by another interpreter than this one if its packages are needed.
    """
    environment = os.environ | OFFLINE | variables
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    with tempfile.TemporaryDirectory() as folder:
        answer, said = Path(folder) / "answer.json", Path(folder) / "stderr"
        arguments = (work, json.dumps(job), str(answer))
        if cap is None and python == sys.executable and variables is ON_CPU and sys.platform == "linux":
            code = _run_forked(arguments, environment, num_threads, said)
        else:
            with said.open("w") as stderr:
                code = subprocess.run(
                    [*(cap.prefix if cap else ()), python, "-m", "benchmarks.harness.job", *arguments],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    preexec_fn=cap.join if cap else None,
                ).returncode
        if code != 0:
            raise JobFailedError(f"exit code {code}: {said.read_text()[-TAIL:].strip()}")
        return json.loads(answer.read_text())


def do_job(work: str, job: str, answer: str) -> None:
    """The other end: do a job, given as JSON, in this process, and write down what comes of it."""
    module, _, function = work.partition(":")
    Path(answer).write_text(json.dumps(getattr(import_module(module), function)(**json.loads(job))))


def _run_forked(
    arguments: tuple[str, str, str], environment: dict[str, str], num_threads: int | None, said: Path
) -> int:
    """Do a job in a child of a process that has imported the package; returns the exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "transformers.models.auto.modeling_auto", "transformers_moe_offload"])
    before = dict(os.environ)
    os.environ.update(environment)  # huggingface_hub reads it once, when it is imported
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    child = context.Process(target=_in_the_child, args=(arguments, environment, num_threads, said))
    child.start()
    child.join()
    code = child.exitcode
    child.close()
    assert code is not None
    return code


def _in_the_child(
    arguments: tuple[str, str, str], environment: dict[str, str], num_threads: int | None, said: Path
) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    for descriptor, path in ((1, os.devnull), (2, said)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    do_job(*arguments)


if __name__ == "__main__":
    do_job(*sys.argv[1:])
