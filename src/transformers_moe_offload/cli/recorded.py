"""Read what `TRACE` and `--trace` name: the file of a trace, or the folder of a recording of the routing."""

from __future__ import annotations

from pathlib import Path

from transformers_moe_offload.routing import RoutingTrace
from transformers_moe_offload.tracing import Trace, TraceError


def load_trace(path: Path) -> tuple[Trace, RoutingTrace | None]:
    """The visits as a trace, and the recording of the routing that they are from, if the path is its folder."""
    found = load_either(path)
    recorded = found if isinstance(found, Trace) else found.to_cache_trace()
    if not recorded.num_asked:
        raise TraceError(f"{path} holds no visit that wants an expert; record a longer one")
    return recorded, found if isinstance(found, RoutingTrace) else None


def load_either(path: Path) -> Trace | RoutingTrace:
    """The trace or the recording at a path, not converted: a recording has token counts of its own."""
    return RoutingTrace.load(path) if path.is_dir() else Trace.load(path)


def num_experts_of(path: Path) -> tuple[int, ...]:
    """Experts with weights of each sparse layer that was recorded."""
    found = load_either(path)
    if isinstance(found, Trace):
        return found.num_experts
    return tuple(facts.num_with_weights for _, _, facts in found.sparse_layers())
