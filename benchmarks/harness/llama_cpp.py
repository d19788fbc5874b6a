"""A model in llama.cpp, in an interpreter that has `llama-cpp-python`.

Through llama.cpp's own functions, because a made model has no tokenizer.
"""

from __future__ import annotations

import os
import time
from typing import Any


class LlamaCpp:
    """A model and its cache of keys and values, on the CPU, with `OMP_NUM_THREADS` threads or one for each core."""

    def __init__(self, path: str, context_tokens: int, *, use_mmap: bool, batch_tokens: int | None = None) -> None:
        """`batch_tokens`: how many are computed together; None for what llama.cpp chooses."""
        import llama_cpp  # not among what the rest of the benchmarks needs

        self.library = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_mmap, options.n_gpu_layers = use_mmap, 0
        model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not model:
            raise OSError(f"llama.cpp cannot load {path}")
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        context_options = llama_cpp.llama_context_default_params()
        context_options.n_ctx = context_tokens
        if batch_tokens is not None:
            context_options.n_batch = context_options.n_ubatch = batch_tokens
        context_options.n_threads = context_options.n_threads_batch = self.threads
        self._context: Any = llama_cpp.llama_init_from_model(model, context_options)

    def decode(self, chunk: list[int]) -> float:
        """Seconds for some tokens that follow those before."""
        array = (self.library.llama_token * len(chunk))(*chunk)  # a name of its own, for the batch only points to it
        batch = self.library.llama_batch_get_one(array, len(chunk))
        started = time.perf_counter()
        code = self.library.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        self.library.llama_synchronize(self._context)
        return time.perf_counter() - started

    def forget(self) -> None:
        """Begin a text."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self._context), True)
