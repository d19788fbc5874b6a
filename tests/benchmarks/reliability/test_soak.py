"""A soak compares every answer with the plain model's and notices what piles up."""

import gc
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for what only Linux tells")


@pytest.mark.parametrize("reading", ["copied", "mapped", "past the page cache, with prefetch"])
def test_a_few_seconds_of_two_threads_and_resizes_change_no_token_and_lose_no_file(
    script, tiny_moe, one_thread, reading, monkeypatch
):
    soak = script("reliability.soak")
    monkeypatch.setattr(soak, "PROMPTS", 4)
    open_files = []
    for _ in range(2):  # what the first one opens for good, such as libraries, the second finds open
        ledger = soak._soak(Path(tiny_moe), seconds=1.0, reading=soak.READINGS[reading], num_threads=2, seed=0)
        assert ledger.answers >= 2, "each thread ends the one that it has begun"
        assert ledger.wrong == []
        assert ledger.resizes >= 2
        gc.collect()
        open_files.append(psutil.Process().num_fds())
    assert open_files[1] <= open_files[0]


def samples(bytes_at):
    return [{"s": float(s), "bytes": float(bytes_at(s)), "files": 9, "threads": 4} for s in range(100)]


def result(bytes_at, wrong=(), last_files=9):
    seen = samples(bytes_at)
    seen[-1]["files"] = last_files
    return {"samples": seen, "answers": 10, "wrong": list(wrong)}


def test_memory_that_only_grows_while_warming_up_is_flat(script):
    verdicts = script("reliability.soak").verdicts(result(lambda s: 1e8 + 1e6 * min(s, 20)))
    assert [is_kept for _, is_kept in verdicts] == [True, True, True]


def test_memory_that_keeps_growing_is_noticed(script):
    verdicts = script("reliability.soak").verdicts(result(lambda s: 1e8 + 1e5 * s))
    assert [is_kept for _, is_kept in verdicts] == [True, False, True]


def test_a_lost_file_and_a_wrong_answer_are_noticed(script):
    verdicts = script("reliability.soak").verdicts(result(lambda s: 1e8, wrong=["other tokens"], last_files=10))
    assert [is_kept for _, is_kept in verdicts] == [False, True, False]
    assert "other tokens" in verdicts[0][0]
