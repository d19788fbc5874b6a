"""Generate for a long time with mixed prompts, two threads and a cache that changes its size; nothing may pile up.

    python -m benchmarks.reliability.soak  # ten minutes
    python -m benchmarks.reliability.soak --minutes 0.1

Every answer is compared with what the plain model says. Memory, open files and threads are sampled meanwhile.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import RESULTS, TINY_MOE
from benchmarks.harness.outcome import Verdict, show, write
from transformers_moe_offload import OffloadConfig, PrefetchConfig
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.passage import Passage, passage_for
from transformers_moe_offload.bench.tables import MIB, Table, mib

BUDGETS = ("5%", "10%", "25%", "40%", "75%", "100%")

READINGS: dict[str, dict[str, Any]] = {
    "copied": {"mmap": False},
    "mapped": {"mmap": "auto"},
    "past the page cache, with prefetch": {"mmap": False, "direct_io": True, "prefetch": PrefetchConfig()},
}
"""How experts get into memory."""

PROMPTS = 24

SAMPLES = 200
"""Of memory and files, over the whole time."""

WARM_UP = 0.3
"""Part of the time in which memory may still grow: allocators and pools fill up."""

GROWTH = 0.02
"""Share of the process's memory by which the fitted line may rise over the rest of the time."""


@dataclass
class Ledger:
    """What the threads have done, and what was seen of the process meanwhile."""

    answers: int = 0
    tokens: int = 0
    resizes: int = 0
    wrong: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Question:
    """A prompt, (B, S) int64, and the tokens that the plain model goes on with."""

    prompt: Tensor
    expected: Tensor

    @property
    def new_tokens(self) -> int:
        """How many tokens are asked for."""
        return self.expected.shape[1] - self.prompt.shape[1]


def soak(
    minutes: Annotated[float, typer.Option(min=0.0, help="How long.")] = 10.0,
    model: Annotated[Path, typer.Option(help="A folder with a checkpoint.")] = TINY_MOE,
    mapped: Annotated[bool, typer.Option(help="Use experts where the page cache has them, or copy them.")] = False,
    past_cache: Annotated[bool, typer.Option(help="Read past the page cache into slots, and ahead.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads that generate.")] = 2,
    seed: Annotated[int, typer.Option(help="Of prompts and sizes.")] = 0,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Soak the package; the exit code says whether everything held."""
    reading = "past the page cache, with prefetch" if past_cache else "mapped" if mapped else "copied"
    ledger = _soak(model, minutes * 60, READINGS[reading], threads, seed)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(model),
        "facts": {
            "model": model.name,
            "setting": f"{minutes:g} minutes, {threads} threads, {reading}, seed {seed}, arithmetic='exact'",
        },
        "answers": ledger.answers,
        "tokens": ledger.tokens,
        "resizes": ledger.resizes,
        "wrong": ledger.wrong,
        "samples": ledger.samples,
    }
    found = verdicts(result)
    show(write(results, "soak", result), result, [table(result)], found)
    raise typer.Exit(0 if all(is_kept for _, is_kept in found) else 1)


def _soak(folder: Path, seconds: float, reading: dict[str, Any], num_threads: int, seed: int) -> Ledger:
    questions = _questions(folder, seed)
    config = OffloadConfig(cache_budget=BUDGETS[-1], arithmetic="exact", **reading)
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
    ledger, is_over = Ledger(), threading.Event()
    workers = [
        threading.Thread(target=_generate, args=(model, questions, ledger, is_over, seed + number))
        for number in range(num_threads)
    ]
    for worker in workers:
        worker.start()
    try:
        _resize_and_sample(model, ledger, seconds, random.Random(seed))
    finally:
        is_over.set()
        for worker in workers:
            worker.join()
    return ledger


def _questions(folder: Path, seed: int, *, most_prompt: int = 256, most_new: int = 12) -> list[Question]:
    """Prompts of mixed lengths and batches, answered by the plain model; those of more tokens are left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    passage, draw = passage_for(model, str(folder)), random.Random(seed)
    drawn = [_prompt(passage, draw) for _ in range(PROMPTS)]
    return [
        Question(prompt, _answer(model, prompt, new_tokens))
        for prompt, new_tokens in drawn
        if prompt.numel() <= most_prompt and new_tokens <= most_new
    ]


def _prompt(passage: Passage, draw: random.Random) -> tuple[Tensor, int]:
    """A prompt, and how many tokens are to follow it."""
    length, batch = draw.choice((1, 3, 8, 20, 64)), draw.choice((1, 1, 1, 2, 4))
    start = draw.randrange(len(passage.tokens))
    shifted = Passage(passage.tokens.roll(-start), passage.is_text, passage.source)
    return shifted.sequences(batch, length), draw.choice((1, 4, 12))


def _answer(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    with torch.inference_mode():
        answer: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return answer


def _generate(model: Any, questions: list[Question], ledger: Ledger, is_over: threading.Event, seed: int) -> None:
    draw = random.Random(seed)
    while not is_over.is_set():
        question = draw.choice(questions)
        try:
            answer = _answer(model, question.prompt, question.new_tokens)
            wrong = "" if torch.equal(answer, question.expected) else "other tokens than the plain model's"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        with ledger.lock:
            ledger.answers += 1
            ledger.tokens += question.prompt.shape[0] * question.new_tokens
            if wrong:
                ledger.wrong.append(wrong)


def _resize_and_sample(model: Any, ledger: Ledger, seconds: float, draw: random.Random) -> None:
    """Another size all the time; memory is sampled at the smallest one, so that slots do not show in it."""
    process, started = psutil.Process(), time.monotonic()
    while (elapsed_s := time.monotonic() - started) < seconds:
        model.moe_offload.resize(draw.choice(BUDGETS))
        time.sleep(seconds / SAMPLES)
        model.moe_offload.resize(BUDGETS[0])
        ledger.resizes += 2
        sample = {"s": elapsed_s, "bytes": _own_bytes(), "files": process.num_fds(), "threads": process.num_threads()}
        ledger.samples.append(sample)


def _own_bytes() -> int:
    """Memory that is no file's (man 5 proc, smaps_rollup, Linux 4.14)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no Anonymous")


def table(result: dict[str, Any]) -> Table:
    """What was seen at the end of the warm-up and at the very end."""
    settled = _settled(result["samples"])
    rows = [
        ["memory, MiB", mib(settled[0]["bytes"]), mib(settled[-1]["bytes"])],
        ["open files", f"{settled[0]['files']:.0f}", f"{settled[-1]['files']:.0f}"],
        ["threads", f"{settled[0]['threads']:.0f}", f"{settled[-1]['threads']:.0f}"],
    ]
    title = f"{result['answers']} answers, {result['tokens']} tokens, {result['resizes']} resizes"
    return Table(title, ["what", "after warming up", "at the end"], rows)


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """What must hold."""
    settled = _settled(result["samples"])
    rise, level = growth(settled)
    files = [sample["files"] for sample in settled]
    wrong = f"; the first: {result['wrong'][0]}" if result["wrong"] else ""
    return [
        ("same tokens as the plain model: " + f"{len(result['wrong'])} of {result['answers']} differ{wrong}",
         result["answers"] > 0 and not result["wrong"]),
        (f"flat memory: {rise / MIB:+.1f} MiB of {mib(level)}, at most {GROWTH:.0%}", rise <= GROWTH * level),
        (f"no lost files: {files[0]:.0f} after warming up, {files[-1]:.0f} at the end, at most {max(files):.0f}",
         files[-1] <= files[0]),
    ]  # fmt: skip


def growth(samples: list[dict[str, float]]) -> tuple[float, float]:
    """By how many bytes the line fitted through the samples rises from the first to the last, and their mean."""
    seconds = np.array([sample["s"] for sample in samples])
    nbytes = np.array([sample["bytes"] for sample in samples])
    slope = np.polyfit(seconds, nbytes, 1)[0]
    return float(slope * (seconds[-1] - seconds[0])), float(nbytes.mean())


def _settled(samples: list[dict[str, float]]) -> list[dict[str, float]]:
    return samples[int(WARM_UP * len(samples)) :]


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("soak.py reads what only Linux tells")
    typer.run(soak)
