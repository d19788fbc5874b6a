"""Take the sparse layers of one model apart, at several sizes of its cache.

python benchmarks/overhead_row.py '{"folder": "...", "is_copied": false, "percents": [50, 100], ...}' answer.json
"""

from __future__ import annotations

from typing import Any

from job import serve
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.dispatch import dispatch
from transformers_moe_offload.bench.passage import passage_for
from transformers_moe_offload.bench.session import facts


def measure_overhead(folder: str, is_copied: bool, percents: list[int], passes: int) -> dict[str, Any]:
    """`bench.dispatch.dispatch` by percent."""
    # A cache that holds everything is made of copies, and stays so when its budget changes; a smaller one is mapped.
    config = OffloadConfig(cache_budget=f"{percents[0]}%", mmap=False if is_copied else "auto")
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
    passage = passage_for(model, folder)
    answer: dict[str, Any] = {"model": facts(model), "passage": passage.source, "passes": passes, "dispatch": {}}
    for percent in percents:
        model.moe_offload.resize(f"{percent}%")
        answer["dispatch"][str(percent)] = dispatch(model, passage.sequences(1, 16), passes)
    return answer


if __name__ == "__main__":
    serve(measure_overhead)
