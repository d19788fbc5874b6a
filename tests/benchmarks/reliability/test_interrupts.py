"""Real signals at random moments of a generation: a short version of `benchmarks/reliability/interrupts.py`."""

import json
import sys
from pathlib import Path

import pytest

from programs import run_program

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals cannot be sent to a thread there")


@pytest.mark.parametrize(
    ("threads", "readings"), [(1, ("copied", "past the page cache, with prefetch")), (4, ("mapped",))]
)
def test_a_generation_that_is_interrupted_again_and_again_leaves_a_model_that_answers_as_before(
    tmp_path, threads, readings
):
    """In a process of its own: an interrupt may leave torch itself in another mode than it was in."""
    options = [option for reading in readings for option in ("--reading", reading)]
    done = run_program(
        "python", "-m", "benchmarks.reliability.interrupts", "--signals", 20, "--threads", threads, *options,
        "--results", tmp_path, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    runs = json.loads(file.read_text())["runs"]
    assert [run["reading"] for run in runs] == list(readings)
    for run in runs:
        assert run["wrong"] == []
        assert run["signals"] == 20
        assert run["checked"] == 2
        assert (run["beside"] > 0) == (threads > 1)
