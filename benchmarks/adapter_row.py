"""Decode with a mixture of adapters: one row of `adapters.py`.

python benchmarks/adapter_row.py '{"folder": "...", "rounds": 5, ...}' answer.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from counters import peak_rss
from job import serve
from loading import FetchCounter
from measure import run
from protocol import Protocol
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.page_cache import drop


def measure_row(
    folder: str, rounds: int, decode_tokens: int, budget: str | None = None, is_cold: bool = False
) -> dict[str, Any]:
    """Runs with all adapters in memory, or, with a budget, with those in use."""
    before_rss, started = peak_rss(), time.perf_counter()
    options = {} if budget is None else {"moe_offload": OffloadConfig(cache_budget=budget, mmap=False)}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    load_s = time.perf_counter() - started
    files = sorted(Path(folder).rglob("adapter_model.safetensors"))
    protocol, nothing = Protocol(decode_tokens=decode_tokens), FetchCounter(model)
    run(model, protocol, nothing)
    runs = []
    for _ in range(rounds):
        if is_cold:
            drop(files)
        runs.append(run(model, protocol, nothing))
    plan = model.moe_offload.plan if budget is not None else None
    return {
        "runs": runs,
        "load_s": load_s,
        "rss_bytes": peak_rss() - before_rss,
        "adapter_bytes": sum(file.stat().st_size for file in files),
        "cache_bytes": None if plan is None else plan.cache_bytes,
    }


if __name__ == "__main__":
    serve(measure_row)
