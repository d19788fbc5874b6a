"""Decode with one checkpoint, everything resident: one row of `low_bits.py`.

python benchmarks/low_bit_row.py '{"folder": "...", "rounds": 5, ...}' answer.json
"""

from __future__ import annotations

import time
from typing import Any

from job import serve
from loading import FetchCounter
from measure import run
from protocol import Protocol
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig


def measure_row(
    folder: str,
    rounds: int,
    decode_tokens: int,
    implementation: str | None = None,
    arithmetic: str = "fast",
) -> dict[str, Any]:
    """Runs of plain Transformers by an experts implementation of its own, or of this package without one."""
    started = time.perf_counter()
    if implementation is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation).eval()
        expert_bytes = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    else:
        config = OffloadConfig(cache_budget="100%", arithmetic=arithmetic)  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
        expert_bytes = model.moe_offload.plan.expert_bytes
    load_s = time.perf_counter() - started
    protocol, nothing = Protocol(decode_tokens=decode_tokens), FetchCounter(model)
    run(model, protocol, nothing)
    runs = [run(model, protocol, nothing) for _ in range(rounds)]
    return {"runs": runs, "expert_bytes": expert_bytes, "load_s": load_s}


if __name__ == "__main__":
    serve(measure_row)
