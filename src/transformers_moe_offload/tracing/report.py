"""Draw a trace and its replays. The only file that imports matplotlib, which comes with the extra `plots`;
`routing/report.py` draws with the figures that are made here."""

# V visits, S steps, L sparse layers, E most experts of a layer

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.policies import ORACLE
from transformers_moe_offload.tracing.replay import Replay
from transformers_moe_offload.tracing.trace import Trace
from transformers_moe_offload.tracing.trace_file import TraceError

WINDOW = 25
"""Steps over which the line in the plot of stalls is a median: enough to smooth, few enough to show a new topic."""

_SPREAD = 20
"""If the longest step waited so many times as long as the median one, a linear axis would show only that step."""


def make_figure(width: float = 11, height: float = 4.6) -> Any:
    """An empty figure, in inches; raises `TraceError` where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TraceError("drawing needs matplotlib; run: pip install 'transformers-moe-offload[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG file."""
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise TraceError(f"cannot write the plot {path}: {error}") from error


def draw_hit_rates(replays: Sequence[Replay], total_experts: int) -> Any:
    """Hit rate by residency, one line a policy below the oracle's, and how far below it each one is."""
    by_policy: dict[str, dict[float, float]] = {}
    for played in replays:
        by_policy.setdefault(played.policy, {})[100 * played.num_slots / total_experts] = 100 * played.hit_rate
    oracle = by_policy.pop(ORACLE)
    figure = make_figure()
    left, right = figure.subplots(1, 2)
    sizes = sorted(oracle)
    left.plot(sizes, [oracle[size] for size in sizes], "k--", lw=2, label=f"{ORACLE} (the limit)")
    left.fill_between(sizes, [oracle[size] for size in sizes], 100, color="0.93", lw=0)
    # The best is drawn last, so that it lies on top.
    for place, (policy, rates) in enumerate(sorted(by_policy.items(), key=lambda item: sum(item[1].values()))):
        style = {"color": f"C{place}", "marker": "o", "ms": 3.5, "lw": 1.4, "label": policy}
        left.plot(sizes, [rates[size] for size in sizes], **style)
        right.plot(sizes, [oracle[size] - rates[size] for size in sizes], **style)
    left.set(title="Hit rate", xlabel="slots, % of all experts", ylabel="experts resident when asked for, %")
    left.set(xlim=(0, 100), ylim=(0, 100))
    right.set(title=f"How far below {ORACLE}", xlabel="slots, % of all experts", ylabel="percentage points")
    right.set(xlim=(0, 100), ylim=(0, None))
    right.axhline(0, color="k", ls="--", lw=2, clip_on=False)
    finish(left, right)
    handles, labels = left.get_legend_handles_labels()
    left.legend([handles[0], *handles[:0:-1]], [labels[0], *labels[:0:-1]], loc="lower right", fontsize=9)
    return figure


def expert_use(trace: Trace) -> NDArray[np.float64]:
    """How often each expert was wanted, 1 being its layer's average: (L, E), NaN where a layer has no such expert."""
    uses = np.full((trace.num_layers, max(trace.num_experts)), np.nan)
    for layer, count in enumerate(trace.num_experts):
        uses[layer, :count] = 0
    for layer, wanted in trace.requests():
        uses[layer, list(wanted)] += 1
    means = np.nanmean(uses, axis=1, keepdims=True)
    return uses / np.where(means > 0, means, 1)


def draw_expert_use(trace: Trace) -> Any:
    """A heat map of `expert_use`: each row a layer, each column an expert."""
    return heat_map(expert_use(trace), "How often each expert was wanted", "sparse layer", "1 = its layer's average")


def heat_map(uses: NDArray[np.float64], title: str, rows: str, label: str) -> Any:
    """How often experts were used, 1 being an average: each row a row of `uses`, each column an expert."""
    figure = make_figure(min(14, 3 + 0.3 * uses.shape[1]), min(10, 1.6 + 0.3 * uses.shape[0]))
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    image = axes.imshow(uses, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    axes.set(title=title, xlabel="expert", ylabel=rows)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, extend="max", label=label)
    return figure


def finish(*many: Any) -> None:
    """Grids, and no frames where no axis is."""
    for axes in many:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def draw_stalls(trace: Trace) -> Any:
    """How long each step waited for loads, and which layers it waited in; None where the trace has no times."""
    if trace.stall_ms is None or not trace.visits:
        return None
    stall_ms = np.array(trace.stall_ms)  # (V,)
    by_step = np.bincount([visit.step for visit in trace.visits], stall_ms, len(trace.step_tokens))  # (S,)
    layers = [visit.layer for visit in trace.visits]
    visits = np.bincount(layers, minlength=trace.num_layers)  # (L,)
    by_layer = np.bincount(layers, stall_ms, trace.num_layers) / np.maximum(visits, 1)  # (L,)
    is_prompt = np.array(trace.step_tokens) > 1
    figure = make_figure()
    if not stall_ms.any():
        figure.text(0.5, 0.5, f"none of {len(by_step):,} steps waited for a load", ha="center", va="center")
        return figure
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    by_step, unit = _in_units(by_step)
    by_layer, layer_unit = _in_units(by_layer)
    steps = np.arange(len(by_step))
    left.plot(steps[~is_prompt], by_step[~is_prompt], ".", ms=3, color="C0", alpha=0.5, label="one step")
    left.plot(steps[is_prompt], by_step[is_prompt], "v", ms=6, color="C3", label="a step that reads a prompt")
    decode, smooth = steps[~is_prompt], by_step[~is_prompt]
    if len(smooth) >= WINDOW:
        medians = np.median(np.lib.stride_tricks.sliding_window_view(smooth, WINDOW), axis=1)
        left.plot(decode[WINDOW // 2 :][: len(medians)], medians, "k", lw=1.5, label=f"median of {WINDOW} steps")
    left.set(title="Waiting for loads, step by step", xlabel="step (forward pass)", ylabel=f"{unit} over all layers")
    if by_step.max() > _SPREAD * np.median(by_step[by_step > 0]):
        # A few steps wait a hundred times as long as most. Three decades show, and what is below is linear.
        left.set_yscale("symlog", linthresh=10.0 ** (math.floor(math.log10(by_step.max())) - 2))
    left.yaxis.set_major_formatter("{x:,g}")
    left.set_ylim(bottom=0, top=1.1 * by_step.max())
    left.legend(fontsize=9)
    right.barh(np.arange(trace.num_layers), by_layer, color="C0")
    right.set(title="and layer by layer", xlabel=f"{layer_unit} a visit, on average", ylabel="sparse layer")
    right.set_xlim(left=0)
    right.xaxis.get_major_locator().set_params(nbins=4)
    right.xaxis.set_major_formatter("{x:,g}")
    right.invert_yaxis()
    right.yaxis.get_major_locator().set_params(integer=True)
    finish(left, right)
    return figure


def _in_units(times_ms: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """Times in the unit in which the greatest of them has a few digits before the point."""
    most = times_ms.max()
    if most < 0.1:
        return 1000 * times_ms, "µs"
    return (times_ms / 1000, "s") if most >= 10_000 else (times_ms, "ms")
