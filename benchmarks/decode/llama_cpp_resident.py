"""llama.cpp with everything in memory: rows of `peers.py`, in an interpreter that has `llama-cpp-python`.

Through llama.cpp's own functions, because a made model has no tokenizer.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any


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
    import llama_cpp

    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.use_mmap, options.n_gpu_layers = False, 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    if not model:
        raise OSError(f"llama.cpp cannot load {path}")
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    context_options = llama_cpp.llama_context_default_params()
    context_options.n_ctx = prompt + tokens + 32
    context_options.n_batch = context_options.n_ubatch = prompt
    context_options.n_threads = context_options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, context_options)
    draw = random.Random(0)

    def decode(count: int) -> float:
        chunk = [draw.randrange(vocab) for _ in range(count)]
        array = (llama_cpp.llama_token * count)(*chunk)  # a name of its own, for the batch only points to it
        batch = llama_cpp.llama_batch_get_one(array, count)
        started = time.perf_counter()
        code = llama_cpp.llama_decode(context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - started

    prompt_s = []
    for _ in range(2):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        prompt_s.append(decode(prompt))
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    decode(16)
    token_s = [decode(1) for _ in range(tokens + 5)]
    return {"token_s": token_s[5:], "prompt_s": min(prompt_s), "nbytes": None, "version": llama_cpp.__version__}
