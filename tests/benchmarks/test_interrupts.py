"""Real signals at random moments of a generation: a short version of what `benchmarks/interrupts.py` does for long."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals cannot be sent to a thread there")


@pytest.mark.parametrize(
    ("reading", "threads"), [("copied", 1), ("past the page cache, with prefetch", 1), ("mapped", 4)]
)
def test_a_generation_that_is_interrupted_again_and_again_leaves_a_model_that_answers_as_before(
    script, tiny_moe, one_thread, reading, threads, monkeypatch
):
    monkeypatch.setattr(script("soak"), "PROMPTS", 8)
    interrupts = script("interrupts")
    questions = script("soak")._questions(Path(tiny_moe), seed=0)
    ledger = interrupts.interrupted(
        Path(tiny_moe), questions, interrupts.READINGS[reading], num_threads=threads, num_signals=20, seed=threads
    )
    assert ledger.wrong == []
    assert ledger.signals == 20
    assert ledger.checked == 2
    assert (ledger.beside > 0) == (threads > 1)
