"""The sections of a report on a routing trace."""

from __future__ import annotations

from transformers_moe_offload.routing.plots import (
    draw_load,
    draw_pairs,
    draw_preferences,
    draw_reuse,
    draw_sureness,
)
from transformers_moe_offload.routing.trace import RoutingTrace
from transformers_moe_offload.tracing import TraceError
from transformers_moe_offload.tracing.page import Section


def sections_of(trace: RoutingTrace) -> list[Section]:
    """A table of all routers, and plots of the data in the trace."""
    if not trace.num_steps:
        raise TraceError("the trace holds no forward; record one")
    routers = range(len(trace.routers))
    statistics = [trace.statistics(router) for router in routers]
    rows = [
        {"router": trace.routers[router].router, "experts": one.num_experts}
        | {name.replace("_", " "): figure for name, figure in one.figures().items()}
        for router, one in enumerate(statistics)
    ]
    sure = draw_sureness(statistics)
    middle = len(statistics) // 2
    sections = [
        Section(
            "Routers",
            "Means over tokens. Entropy in bits; margin: least probability of a chosen expert less the greatest of a "
            "rejected one; confidence: share of the probability that the chosen experts have; load: 0 = all experts "
            "alike; repeat rate: share of a token's experts that the token before had, too.",
            rows=rows,
        ),
        Section(
            "Sureness",
            "Shaded: quarters and tenths of the tokens. A margin below zero means that a strategy chose in the "
            "router's place."
            if sure is not None
            else "The trace was recorded without scores.",
            sure,
        ),
        Section("Load", "Red: chosen more often than the router's other experts.", draw_load(statistics)),
        Section("Reuse", "What a cache can live on.", draw_reuse(statistics)),
        Section(
            "Company",
            "Of the router in the middle of the model. Diagonal on the right: experts that stay.",
            draw_pairs(statistics[middle], trace.routers[middle].router),
        ),
    ]
    if trace.domains:
        preferences = [trace.preferences(router) for router in routers]
        text = "Red: chosen more often in this domain than in others."
        sections.append(Section("Domains", text, draw_preferences(preferences, trace.domains)))
    return sections
