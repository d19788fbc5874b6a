"""How fast a row could be at best.

With m experts missed per token, S bytes each, no reader can need less than `m * S / bandwidth` for a token, and no
arithmetic less than what it takes with every expert in the cache. Both can go on at once, so the limit is the larger.
"""

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
    rows = results["rows"]
    resident = rows.get("ours 100% fast", {}).get("warm")
    if not resident or "slots" not in rows[name]:
        return None
    missed_bytes = per_token(rows[name][state], "misses") * results["expert_bytes"]
    return max(missed_bytes / results["bandwidth"][f"{state}_bytes_per_s"], seconds_per_token(resident))
