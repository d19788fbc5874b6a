"""Measure how fast experts can be read from their files: cold from the disk, warm from the page cache.

python benchmarks/bandwidth.py '{"folder": "...", "repeats": 3}' answer.json
"""

from __future__ import annotations

from typing import Any

from job import serve
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.bandwidth import disk_bandwidth, expert_ranges
from transformers_moe_offload.bench.layers import store_of
from transformers_moe_offload.disk_io.reader_pool import default_workers


def measure_bandwidth(folder: str, repeats: int) -> dict[str, Any]:
    """Bytes per second with as many threads as the package reads with."""
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=OffloadConfig(cache_budget="10%"))
    return disk_bandwidth(expert_ranges(store_of(model)), default_workers(), repeats)


if __name__ == "__main__":
    serve(measure_bandwidth)
