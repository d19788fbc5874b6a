"""The sections of a report on a routing trace, and their plots. Needs matplotlib (extras `plots` and `research`)."""

# R routers, E most experts of a router, D domains

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.routing.statistics import RouterStatistics
from transformers_moe_offload.routing.trace import RoutingTrace
from transformers_moe_offload.tracing import TraceError
from transformers_moe_offload.tracing.page import Section
from transformers_moe_offload.tracing.report import finish, heat_map, make_figure


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
    sure = _sureness(statistics)
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
            "Load", "Red: chosen more often than the average expert of its router; blue: less often.", _load(statistics)
        ),
        Section(
            "Reuse",
            "Hit rate of an LRU cache by its size, and the share of experts that repeat from token to token.",
            _reuse(statistics),
        ),
        Section(
            "Pairs",
            "Pairs of experts of the router in the middle of the model, compared with chance. Diagonal on the right: "
            "the same expert for two tokens in a row.",
            _pairs(statistics[middle], trace.routers[middle].router),
        ),
    ]
    if trace.domains:
        preferences = [trace.preferences(router) for router in routers]
        text = "Red: chosen more often in this domain than in others."
        sections.append(Section("Domains", text, _preferences(preferences, trace.domains)))
    return sections


def _sureness(statistics: Sequence[RouterStatistics]) -> Any:
    """Entropy, and margin between chosen and rejected, router by router; None where no scores were recorded."""
    if not all(one.entropy.size for one in statistics):
        return None
    figure = make_figure()
    left, right = figure.subplots(1, 2)
    margins = [one.margin[np.isfinite(one.margin)] for one in statistics]
    _bands(left, [one.entropy / np.log2(max(2, one.num_experts)) for one in statistics], "C0")
    _bands(right, [margin if margin.size else np.zeros(1) for margin in margins], "C1")
    left.set(title="Entropy of the scores", ylabel="entropy, 1 = no preference", ylim=(0, 1))
    right.set(title="Margin of chosen over rejected experts", ylabel="least chosen - best rejected, probability")
    right.axhline(0, color="0.5", lw=1)
    left.legend(loc="lower right", fontsize=9)
    _finish(left, right)
    return figure


def _load(statistics: Sequence[RouterStatistics]) -> Any:
    """A heat map of how often each expert was chosen: each row a router, each column an expert."""
    uses = np.full((len(statistics), max(one.num_experts for one in statistics)), np.nan)
    for row, one in enumerate(statistics):
        uses[row, : one.num_experts] = one.load / max(one.load.mean(), 1e-9)
    return heat_map(uses, "Uses of each expert", "router", "1 = its router's average")


def _reuse(statistics: Sequence[RouterStatistics]) -> Any:
    """Hits of an LRU cache for each layer alone, and the share of experts that repeat from a token to the next."""
    figure = make_figure()
    left, right = figure.subplots(1, 2)
    for number, one in enumerate(statistics):
        slots = range(1, one.num_experts + 1)
        rates = [100 * one.lru_hit_rate(num_slots) for num_slots in slots]
        colour = (0.1, 0.3, 0.6, 0.35 + 0.6 * number / max(1, len(statistics) - 1))
        left.plot([100 * num / one.num_experts for num in slots], rates, color=colour, lw=1.4)
    left.set(title="Hit rate of an LRU cache, a line for each router", xlim=(0, 100), ylim=(0, 100))
    left.set(ylabel="experts resident when asked for, %")
    by_chance = [100 * float(one.load.sum()) / max(1, one.num_tokens) / one.num_experts for one in statistics]
    right.bar(range(len(statistics)), [100 * one.repeat_rate for one in statistics], color="C0")
    right.plot(range(len(statistics)), by_chance, "k--", lw=1.2, label="experts drawn at random")
    right.set(title="Experts that the token before had chosen", ylabel="%")
    right.set_ylim(0, 1.2 * right.get_ylim()[1])  # room for the legend
    right.legend(fontsize=9)
    _finish(left, right)
    left.set(xlabel="slots, % of the layer's experts")
    return figure


def _preferences(preferences: Sequence[NDArray[np.float64]], domains: Sequence[str]) -> Any:
    """Heat maps of each domain's preferences, side by side: each row a router, each column an expert."""
    width = max(one.shape[1] for one in preferences)
    figure = make_figure(min(16, 3 + 3.6 * len(domains)), min(8, 1.8 + 0.3 * len(preferences)))
    panels = figure.subplots(1, len(domains), squeeze=False)[0]
    for number, (axes, domain) in enumerate(zip(panels, domains, strict=True)):
        values = np.full((len(preferences), width), np.nan)
        for row, one in enumerate(preferences):
            values[row, : one.shape[1]] = one[number]
        image = axes.imshow(values, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        axes.set(title=domain, xlabel="expert", ylabel="router" if not number else "")
    figure.colorbar(image, ax=figure.axes, extend="max", label="1 = average of the domains")
    return figure


def _pairs(one: RouterStatistics, router: int) -> Any:
    """How often experts of a router are chosen together, or by one token and the next, relative to chance."""
    figure = make_figure()
    left, right = figure.subplots(1, 2)
    together = one.co_activation.astype(np.float64)
    np.fill_diagonal(together, 0)
    _lift(left, together, one.load, f"Chosen by the same token, router {router}")
    _lift(right, one.next_token.astype(np.float64), one.load, "Chosen by a token and by the next")
    left.set(xlabel="expert", ylabel="expert")
    right.set(xlabel="expert of the next token", ylabel="expert of a token")
    figure.colorbar(left.images[0], ax=[left, right], extend="max", label="1 = as often as by chance")
    return figure


def _lift(axes: Any, counts: NDArray[np.float64], load: NDArray[np.int64], title: str) -> None:
    expected = np.outer(load, load).astype(np.float64)
    np.fill_diagonal(expected, np.where(np.diag(counts) > 0, np.diag(expected), 0))
    expected *= counts.sum() / max(expected.sum(), 1)
    lift = np.where(expected > 0, counts / np.where(expected > 0, expected, 1), np.nan)
    axes.set_facecolor("0.85")
    axes.imshow(lift, vmin=0, vmax=3, cmap="viridis", interpolation="nearest")
    axes.set(title=title)


def _bands(axes: Any, values: Sequence[NDArray[np.float64]], colour: str) -> None:
    """Median, quartiles and tenths of each router's tokens."""
    places = np.arange(len(values))
    tenth, quarter, middle, three, nine = (
        np.array([np.quantile(v, q) for v in values]) for q in (0.1, 0.25, 0.5, 0.75, 0.9)
    )
    axes.fill_between(places, tenth, nine, color=colour, alpha=0.15, lw=0, label="80% of the tokens")
    axes.fill_between(places, quarter, three, color=colour, alpha=0.3, lw=0, label="50% of the tokens")
    axes.plot(places, middle, color=colour, marker="o", ms=3.5, lw=1.5, label="median")


def _finish(*many: Any) -> None:
    for axes in many:
        axes.set(xlabel="router")
        axes.xaxis.get_major_locator().set_params(integer=True)
    finish(*many)
