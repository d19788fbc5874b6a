"""Decode with llama.cpp, its weights mapped: one row of `capped.py`, in an interpreter that has `llama-cpp-python`.

Through llama.cpp's own functions, because a made model has no tokenizer. What is measured is as in `measure.py`:
one token a step, laid down beforehand, from the end of the prompt on.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any


def measure_llama_cpp(path: str, protocol: dict[str, Any], vocab: int) -> dict[str, Any]:
    """Runs of one token after another; the first is not counted."""
    import llama_cpp  # not among what the rest of the benchmarks needs

    os.posix_fadvise(os.open(path, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.use_mmap, options.n_gpu_layers = True, 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    if not model:
        raise OSError(f"llama.cpp cannot load {path}")
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    context_options = llama_cpp.llama_context_default_params()
    context_options.n_ctx = protocol["prompt_tokens"] + protocol["decode_tokens"] + 8
    context_options.n_threads = context_options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, context_options)
    draw = random.Random(protocol["seed"])
    prompt = [draw.randrange(vocab) for _ in range(protocol["prompt_tokens"])]
    tokens = [draw.randrange(vocab) for _ in range(protocol["decode_tokens"])]

    def decode(chunk: list[int]) -> float:
        array = (llama_cpp.llama_token * len(chunk))(*chunk)  # a name of its own, for the batch only points to it
        batch = llama_cpp.llama_batch_get_one(array, len(chunk))
        started = time.perf_counter()
        code = llama_cpp.llama_decode(context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - started

    def run() -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        decode(prompt)
        token_s = [decode([token]) for token in tokens]
        return {"tokens": len(token_s), "elapsed_s": sum(token_s), "token_s": token_s}

    run()
    return {"capped": [run() for _ in range(protocol["runs"])], "threads": threads, "version": llama_cpp.__version__}
