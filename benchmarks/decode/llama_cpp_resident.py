"""llama.cpp with everything in memory: rows of `peers.py`, in an interpreter that has `llama-cpp-python`."""

from __future__ import annotations

import os
import random
from typing import Any

from benchmarks.harness.llama_cpp import LlamaCpp


def quantize(source: str, target: str) -> dict[str, int]:
    """Write a model in llama.cpp's q4_0: 4 bits with a scale for each 32 weights, more for the output embedding."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(source.encode(), f"{target}.unfinished".encode(), options):
        raise OSError(f"llama.cpp cannot quantize {source}")
    os.rename(f"{target}.unfinished", target)
    return {"nbytes": os.path.getsize(target)}


def measure(path: str, vocab: int, tokens: int, prompt: int) -> dict[str, Any]:
    """Seconds for each token after a short prompt, and for a long prompt."""
    model = LlamaCpp(path, prompt + tokens + 32, use_mmap=False, batch_tokens=prompt)
    draw = random.Random(0)

    def decode(count: int) -> float:
        return model.decode([draw.randrange(vocab) for _ in range(count)])

    prompt_s = []
    for _ in range(2):
        model.forget()
        prompt_s.append(decode(prompt))
    model.forget()
    decode(16)
    token_s = [decode(1) for _ in range(tokens + 5)]
    return {"token_s": token_s[5:], "prompt_s": min(prompt_s), "nbytes": None, "version": model.library.__version__}
