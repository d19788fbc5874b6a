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
        raise TraceError("the trace holds 0 forwards; run the model while it is recorded")
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
            "rejected one; confidence: share of the probability that the chosen experts have; load: 0 if all experts "
            "are used equally; repeat rate: share of a token's experts that the token before it had chosen, too.",
            rows=rows,
        ),
        Section(
            "Sureness",
            "Line: median; shaded: the middle 50 % and 80 % of the tokens. The margin is negative where a strategy "
            "chose in place of the router."
            if sure is not None
            else "The trace was recorded without scores.",
            sure,
        ),
        Section(
            "Load",
            "Red: chosen more often than the average expert of its router; blue: less often.",
            draw_load(statistics),
        ),
        Section(
            "Reuse",
            "Hit rate of an LRU cache by its size, and the share of experts that repeat from token to token.",
            draw_reuse(statistics),
        ),
        Section(
            "Pairs",
            "Pairs of experts of the router in the middle of the model, compared with chance. Diagonal on the right: "
            "the same expert for two tokens in a row.",
            draw_pairs(statistics[middle], trace.routers[middle].router),
        ),
    ]
    if trace.domains:
        preferences = [trace.preferences(router) for router in routers]
        text = "Red: chosen more often in this domain than in others."
        sections.append(Section("Domains", text, draw_preferences(preferences, trace.domains)))
    return sections
