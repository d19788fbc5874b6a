"""Hold results against what the package promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.decode.limit import per_token, seconds_per_token

AS_FAST = 0.95
"""With every expert in the cache, decoding reaches at least this share of plain Transformers' tokens per second."""

LOADING_EXTRA_BYTES = 200_000_000
"""Loading may hold this much beyond dense weights, cache, one shard and the imported code."""


@dataclass(frozen=True)
class Verdict:
    """One promise: kept, broken, or not to be judged because a row is missing (None)."""

    promise: str
    is_kept: bool | None
    figures: str


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """All promises about decoding and loading."""
    return [
        _as_fast_as_plain(results),
        _as_fast_as_accelerate(results),
        *_fewer_bytes_than_accelerate(results),
        _exact(results),
        *_bounded_while_loading(results),
    ]


def _best(results: dict[str, Any], kind: str) -> tuple[str, float] | None:
    """The fastest row of a kind and its seconds per token, page cache warm."""
    timed = {name: seconds_per_token(row["warm"]) for name, row in _of_kind(results, kind).items()}
    return min(timed.items(), key=lambda item: item[1]) if timed else None


def _of_kind(results: dict[str, Any], kind: str) -> dict[str, Any]:
    return {name: row for name, row in results["rows"].items() if name.startswith(f"{kind} ")}


def _as_fast_as_plain(results: dict[str, Any]) -> Verdict:
    promise = "100% budget: within 5% of the best plain row"
    ours, best = results["rows"].get("ours 100% fast"), _best(results, "plain")
    if ours is None or best is None:
        return Verdict(promise, None, "rows missing")
    ours_s = seconds_per_token(ours["warm"])
    figures = f"{1 / ours_s:.2f} tokens/s against {1 / best[1]:.2f} of {best[0]}: {best[1] / ours_s - 1:+.1%}"
    return Verdict(promise, best[1] / ours_s >= AS_FAST, figures)


def _as_fast_as_accelerate(results: dict[str, Any]) -> Verdict:
    promise = "25% budget, page cache warm: at least as fast as accelerate from disk"
    ours, best = results["rows"].get("ours 25% fast"), _best(results, "accelerate")
    if ours is None or best is None:
        return Verdict(promise, None, "rows missing")
    ours_s = seconds_per_token(ours["warm"])
    return Verdict(promise, ours_s <= best[1], f"{1 / ours_s:.2f} tokens/s against {1 / best[1]:.2f} of {best[0]}")


def _fewer_bytes_than_accelerate(results: dict[str, Any]) -> Iterator[Verdict]:
    """By shapes (whole layers) and as counted at accelerate's hooks."""
    shape = results["shape"]
    factor = shape["experts"] / shape["experts_per_token"]
    promise = f"25% budget: at least E/k = {factor:g} times fewer bytes than accelerate fetches"
    ours = results["rows"].get("ours 25% fast")
    if ours is None:
        yield Verdict(promise, None, "rows missing")
        return
    ours_bytes = max(per_token(ours["warm"], "disk_bytes"), 1.0)
    rows = _of_kind(results, "accelerate").items()
    theirs = {"by shapes": results["all_expert_bytes"]} | {
        f"counted, {name}": per_token(row["warm"], "fetched_bytes") for name, row in rows
    }
    for how, nbytes in theirs.items():
        figures = (
            f"{ours_bytes / 2**20:.1f} MiB/token against {nbytes / 2**20:.1f}: {nbytes / ours_bytes:.1f} times fewer"
        )
        yield Verdict(f"{promise} ({how})", nbytes >= factor * ours_bytes, figures)


def _exact(results: dict[str, Any]) -> Verdict:
    promise = "arithmetic='exact': the logits of plain eager experts, bit for bit"
    ours, plain = results["rows"].get("ours 100% exact"), results["rows"].get("plain eager")
    if ours is None or plain is None:
        return Verdict(promise, None, "rows missing")
    return Verdict(promise, ours["digest"] == plain["digest"], f"{ours['digest'][:12]} and {plain['digest'][:12]}")


def _bounded_while_loading(results: dict[str, Any]) -> Iterator[Verdict]:
    for name, row in _of_kind(results, "ours").items():
        allowed = (
            results["dense_bytes"]
            + row["cache_bytes"]
            + results["shard_bytes"]
            + LOADING_EXTRA_BYTES
            + row["baseline_rss"]
        )
        figures = f"{row['load_peak_rss'] / 2**20:.0f} MiB of {allowed / 2**20:.0f} allowed"
        yield Verdict(f"{name}: peak RSS while loading", row["load_peak_rss"] <= allowed, figures)
