"""Work that is done in a process of its own: described in JSON on the way in, answered in JSON on the way out.

A process of its own, because what one row has allocated, mapped or warmed up must not show in another row's figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cap import Cap

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""For jobs that compute on the CPU, whatever else there is."""

TAIL = 2000
"""Characters of a failed process's stderr that are kept."""


class JobFailedError(Exception):
    """The process ended without an answer; the message is the end of what it wrote to stderr."""


def run_job(
    script: str,
    job: dict[str, Any],
    num_threads: int | None,
    *,
    cap: Cap | None = None,
    python: str = sys.executable,
    variables: Mapping[str, str] = ON_CPU,
) -> Any:
    """Run a script of this folder on a job and return its answer; `variables` are added to its environment.

    Under a `cap` if one is given, and by another interpreter than this one if its packages are needed.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | variables
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [python, str(Path(__file__).with_name(script)), json.dumps(job), str(answer)]
        done = subprocess.run(
            [*(cap.prefix if cap else ()), *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=cap.join if cap else None,
        )
        if done.returncode != 0:
            raise JobFailedError(f"exit code {done.returncode}: {done.stderr[-TAIL:].strip()}")
        return json.loads(answer.read_text())


def serve(work: Any) -> None:
    """The other end: call `work` with the job's fields and write down what it returns."""
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    answer.write_text(json.dumps(work(**job)))
