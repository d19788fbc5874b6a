"""Which experts are used most, by how many tokens chose each: of a trace, of a recording of the routing, or counted.

`Trace.token_counts` and `RoutingTrace.token_counts` count the tokens; this file chooses experts by the counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from transformers_moe_offload.tracing.trace_file import TraceError


@runtime_checkable
class CountsTokens(Protocol):
    """Knows how many tokens chose each expert."""

    def token_counts(self) -> Mapping[str, Sequence[int]]:
        """How many tokens chose each expert, by the path of the experts module."""


def hottest_experts(counts: Mapping[int, Sequence[int]], share: float | str) -> dict[str, list[int]]:
    """The share of all experts that most tokens chose, for `ExpertFormats(hot_experts=...)`.

    `counts` are by the number of the sparse layer. Experts of all layers are compared with one another; of equal counts
    the lower layer and the lower number come first. Experts that no token chose are not hot, however large the share.
    """
    total_experts = sum(map(len, counts.values()))
    wanted = round(parse_share(share) * total_experts)
    if wanted < 1:
        raise TraceError(f"{share!r} of {total_experts} experts is less than one of them; choose a larger share")
    chosen = [
        (-uses, layer, expert) for layer, of_layer in counts.items() for expert, uses in enumerate(of_layer) if uses
    ]
    if not chosen:
        raise TraceError("no token chose an expert in what was recorded; record a longer text")
    hot: dict[str, list[int]] = {}
    for layer, expert in sorted((layer, expert) for _, layer, expert in sorted(chosen)[:wanted]):
        hot.setdefault(str(layer), []).append(expert)
    return hot


def parse_share(share: float | str) -> float:
    """A share as people write it, `"10%"` or `0.1`, as a number; raises `TraceError` for anything else."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%", share.strip()) if isinstance(share, str) else None
    number = float(match[1]) / 100 if match else share
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 1:
        raise TraceError(f"{share!r} is not a share of all experts; write '10%' or 0.1")
    return float(number)
