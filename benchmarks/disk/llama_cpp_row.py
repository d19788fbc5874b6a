"""Decode with llama.cpp, its weights mapped: one row of `capped.py`, in an interpreter that has `llama-cpp-python`.

Through llama.cpp's own functions, because a made model has no tokenizer. What is measured is as in `measure.py`:
one token a step, laid down beforehand, from the end of the prompt on.
"""

from __future__ import annotations

import os
import random
from typing import Any

from benchmarks.harness.llama_cpp import LlamaCpp


def measure_llama_cpp(path: str, protocol: dict[str, Any], vocab: int) -> dict[str, Any]:
    """Runs of one token after another; the first is not counted."""
    os.posix_fadvise(os.open(path, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
    model = LlamaCpp(path, protocol["prompt_tokens"] + protocol["decode_tokens"] + 8, use_mmap=True)
    draw = random.Random(protocol["seed"])
    prompt = [draw.randrange(vocab) for _ in range(protocol["prompt_tokens"])]
    tokens = [draw.randrange(vocab) for _ in range(protocol["decode_tokens"])]

    def run() -> dict[str, Any]:
        model.forget()
        model.decode(prompt)
        token_s = [model.decode([token]) for token in tokens]
        return {"tokens": len(token_s), "elapsed_s": sum(token_s), "token_s": token_s}

    run()
    capped = [run() for _ in range(protocol["runs"])]
    return {"capped": capped, "threads": model.threads, "version": model.library.__version__}
