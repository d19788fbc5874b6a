"""Measure the same work with and without prefetch, in one process and taking turns.

python benchmarks/in_turns.py '{"folder": "...", "budget": "25%", "state": "cold", ...}' answer.json
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from job import serve
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.layers import files_of, store_of
from transformers_moe_offload.bench.page_cache import drop, warm
from transformers_moe_offload.bench.passage import passage_for
from transformers_moe_offload.bench.session import facts, unmap_dense
from transformers_moe_offload.bench.workload import Workload, run
from transformers_moe_offload.config import PrefetchConfig

ROWS = {"off": None, "on": PrefetchConfig()}


def measure_in_turns(
    folder: str, budget: str, state: str, is_copied: bool, works: list[dict[str, Any]], rounds: int
) -> dict[str, Any]:
    """Runs of each work by row, one of each a round; a round that is not counted comes before them."""
    models = {
        name: AutoModelForCausalLM.from_pretrained(
            folder,
            moe_offload=OffloadConfig(cache_budget=budget, prefetch=prefetch, mmap=False if is_copied else "auto"),
        ).eval()
        for name, prefetch in ROWS.items()
    }
    files = files_of(store_of(models["off"]))
    passage = passage_for(models["off"], folder)
    warm(files)
    for model in models.values():
        unmap_dense(model)
    answer: dict[str, Any] = {"model": facts(models["on"]), "passage": passage.source, "works": {}}
    for work in (Workload(**fields) for fields in works):
        runs: dict[str, list[Any]] = {name: [] for name in models}
        for number in range(rounds + 1):
            for name, model in models.items():
                done = run(model, work, passage, before_forward=lambda: drop(files) if state == "cold" else None)
                if number:
                    runs[name].append(asdict(done))
        answer["works"][work.name] = runs
    return answer


if __name__ == "__main__":
    serve(measure_in_turns)
