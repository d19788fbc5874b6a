"""Measure one variant of the ablation, page cache warm and cold.

python benchmarks/ablate.py '{"variant": "lru", "folder": "...", "budget": "25%", ...}' answer.json
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch
from job import serve
from transformers import AutoModelForCausalLM
from variants import variants, written_share

from transformers_moe_offload.bench.passage import passage_for
from transformers_moe_offload.bench.session import facts, repeated
from transformers_moe_offload.bench.workload import Workload


def measure_variant(
    variant: str, folder: str, budget: str, prompt_tokens: int, steps: int, runs: int
) -> dict[str, Any]:
    """Runs by page cache state, and a digest of the logits, which no variant may change."""
    chosen = next(row for row in variants() if row.name == variant)
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=chosen.config(budget)).eval()
    chosen.apply(model)
    passage = passage_for(model, folder)
    with torch.inference_mode():
        logits = model(passage.sequences(1, prompt_tokens)).logits
    work = Workload(name="decode", prompt_tokens=prompt_tokens, steps=steps)
    answer: dict[str, Any] = {"says": chosen.says, "model": facts(model), "passage": passage.source}
    answer["digest"] = hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()
    for state in chosen.states:
        answer[state] = [asdict(one) for one in repeated(model, work, passage, runs, state)]
    return answer | {"written_share": written_share(model)}


if __name__ == "__main__":
    serve(measure_variant)
