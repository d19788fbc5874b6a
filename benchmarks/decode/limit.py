"""How fast a row could be at best: the limit of `transformers_moe_offload.bench.limit`, from a row's runs."""

from __future__ import annotations

from statistics import median
from typing import Any

State = str
"""Of the page cache: `cold` or `warm`."""


def seconds_per_token(runs: list[dict[str, Any]]) -> float:
    """Median over the runs."""
    return median(run["elapsed_s"] / run["tokens"] for run in runs)


def per_token(runs: list[dict[str, Any]], counter: str) -> float:
    """Median of a counter, per token."""
    return median(run[counter] / run["tokens"] for run in runs)


def limit_s(results: dict[str, Any], name: str, state: State) -> float | None:
    """Seconds that a token of one of our rows needs at least; None for others, or where a figure is missing."""
    from transformers_moe_offload.bench.limit import Crossing, least_s  # here, for `check.py` is not to wait for torch

    rows = results["rows"]
    resident = rows.get("ours 100% fast", {}).get("warm")
    if not resident or "slots" not in rows[name]:
        return None
    if state == "warm" and rows[name]["is_mapped"]:  # the page cache is used where it is, nothing is brought in
        return seconds_per_token(resident)
    missed_bytes = per_token(rows[name][state], "misses") * results["expert_bytes"]
    crossing = Crossing(missed_bytes, results["bandwidth"][f"{state}_bytes_per_s"])
    return least_s([crossing], seconds_per_token(resident))
