"""A trace as a table for pandas and other readers of Arrow. The only file that imports pyarrow (extra `research`)."""

# N tokens at one router, K experts per token

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.trace_data import RecordedRouting, rows_of
from transformers_moe_offload.tracing import TraceError

if TYPE_CHECKING:
    import pyarrow


def to_arrow(trace: RecordedRouting) -> pyarrow.Table:
    """A row for every token and router, with its experts and weights.

    Columns: router, token_id, sequence, position, turn, domain, experts, weights and, where scores were recorded,
    entropy, margin and confidence. `turn` counts the router's earlier calls with the same token in the same forward.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise TraceError(
            "tables need pyarrow and pandas; run: pip install 'transformers-moe-offload[research]'"
        ) from error
    tables = [
        pyarrow.table(_columns(trace, part, router, pyarrow))
        for part in trace.parts()
        for router in range(len(trace.routers))
    ]
    if not tables:
        raise TraceError("the trace holds 0 forwards; run the model while it is recorded")
    return pyarrow.concat_tables(tables, promote_options="default")


def _columns(trace: RecordedRouting, part: Any, router: int, arrow: Any) -> dict[str, Any]:
    rows = rows_of(part, router)
    kept = rows.experts >= 0
    ends = np.r_[0, kept.sum(axis=1).cumsum()].astype(np.int32)
    names = np.array([*trace.domains, None], dtype=object)
    columns = {
        "router": np.full(len(kept), trace.routers[router].router, np.int32),
        "token_id": rows.token_ids,
        "sequence": rows.sequence,
        "position": rows.position,
        "turn": rows.turn,
        "domain": arrow.array(names[rows.domain], arrow.string()),
        "experts": arrow.ListArray.from_arrays(ends, rows.experts[kept]),
        "weights": arrow.ListArray.from_arrays(ends, rows.weights[kept]),
    }
    if rows.scores is not None:
        chances = trace.probabilities(rows, router)
        columns["entropy"] = measures.entropy(chances)
        columns["margin"] = measures.margin(chances, rows.experts)
        columns["confidence"] = measures.confidence(chances, rows.experts)
    return columns
