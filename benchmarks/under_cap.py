"""Measure one row while memory is capped: the page cache starts empty and keeps what the cap lets it keep.

python benchmarks/under_cap.py '{"row": {...}, "folder": "...", "scratch": "...", "protocol": {...}}' answer.json
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from job import serve
from loading import FetchCounter, load
from measure import plan_of, run
from protocol import Protocol
from rows import Row

from transformers_moe_offload.bench.page_cache import drop


def measure_under_cap(row: dict[str, Any], folder: str, scratch: str, protocol: dict[str, Any]) -> dict[str, Any]:
    """Runs of one row; the first is not counted."""
    lengths = Protocol(**protocol)
    model = load(Row(**row), Path(folder), Path(scratch)).eval()
    os.sync()  # what accelerate has written must be on the disk before it can be dropped from the page cache
    drop([*sorted(Path(folder).glob("*.safetensors")), *(file for file in Path(scratch).rglob("*") if file.is_file())])
    fetched = FetchCounter(model)
    run(model, lengths, fetched)
    runs = [run(model, lengths, fetched) for _ in range(lengths.runs)]
    return {"capped": runs, **plan_of(model)}


if __name__ == "__main__":
    serve(measure_under_cap)
