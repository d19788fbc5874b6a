"""Show what `prefetch_recall.py` has found: a page with its tables, and a plot with both panels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import torch

from transformers_moe_offload.bench.conditions import described

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def as_markdown(result: dict[str, Any]) -> str:
    """A page with the conditions and all tables."""
    top_k, num_ranks = result["top_k"], 2 * result["top_k"]
    lines = [f"# Recall of predictors, hit ratio of LRU: tiny-moe, {result['date']}", ""]
    lines += ["![LRU hit ratio and recall](prefetch-recall-tiny-moe.png)", ""]
    facts = {**described(result["conditions"]), "model": result["model"], "text": result["text"]}
    facts["torch threads"] = str(torch.get_num_threads())
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", worth_of_norms(result["predictors"])]
    counts = [n for n in range(1, num_ranks + 1) if n in (1, 2, 3) or n % 2 == 0]
    for title, key in (
        (f"Recall: share of a token's {top_k} experts among the n guessed first", "recall"),
        (f"Of the experts that an LRU of {result['cached']} slots a layer misses: share among the n guessed first "
         "that are absent", "recall_of_misses"),
    ):  # fmt: skip
        lines += ["", f"## {title}", "", line(["predictor", "layers ahead", *(f"n = {n}" for n in counts)])]
        lines.append(line(["---", "---:", *(["---:"] * len(counts))]))
        for (name, figures), ahead in product(result["predictors"].items(), result["ahead"]):
            recalls = figures[key][ahead]
            lines.append(line([name, str(ahead), *(f"{recalls[n - 1]:.1%}" for n in counts)]))
    lines += ["", "## Confidence: mean distance from the share that came true", "", line(["predictor", "distance"])]
    lines.append(line(["---", "---:"]))
    for name, figures in result["predictors"].items():
        lines.append(line([name, f"{figures['calibration']['expected_calibration_error']:.3f}"]))
    slots = [n for n in range(1, result["num_experts"] + 1) if n <= 4 or n % 2 == 0]
    lines += ["", "## Hit ratio of LRU by slots a layer", "", line(["layer", *map(str, slots)])]
    lines.append(line(["---", *(["---:"] * len(slots))]))
    ratios = result["lru_hit_ratio"]
    for layer, row in enumerate(ratios):
        lines.append(line([str(layer), *(f"{row[n - 1]:.1%}" for n in slots)]))
    lines.append(line(["mean", *(f"{sum(row[n - 1] for row in ratios) / len(ratios):.1%}" for n in slots)]))
    return "\n".join(lines) + "\n"


def worth_of_norms(figures: dict[str, Any]) -> str:
    """The difference that taking norms into account makes, over all distances and numbers of experts."""
    with_norms, without = (figures[name]["recall"] for name in ("next_router", "next_router, norms ignored"))
    gains = [a - b for ahead in with_norms for a, b in zip(with_norms[ahead], without[ahead], strict=True)]
    return (
        f"Taking the norms before the experts into account changes the recall of next_router by "
        f"{100 * min(gains):+.1f} to {100 * max(gains):+.1f} points, {100 * sum(gains) / len(gains):+.2f} on average."
    )


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rounded(value: Any) -> Any:
    """Ratios to four digits, so that a rerun changes no more than it must."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def draw(result: dict[str, Any], path: Path) -> None:
    """The figure: hit ratio of LRU by layer on the left, recall by layers ahead on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.4), layout="constrained")
    ratios, num_experts, top_k = result["lru_hit_ratio"], result["num_experts"], result["top_k"]
    slots = range(1, num_experts + 1)
    colors = plt.get_cmap("viridis")
    for layer, row in enumerate(ratios):
        left.plot(slots, row, color=colors(0.95 * layer / (len(ratios) - 1)), lw=1.2, label=f"layer {layer}")
    left.plot(slots, [n / num_experts for n in slots], color="0.6", ls=":", label="cached / all")
    left.set(title="LRU hit ratio", xlabel="cached experts per layer", ylabel="hit ratio", xticks=slots[1::2])

    guessed = range(1, 2 * top_k + 1)
    recalls = {name: figures["recall"] for name, figures in result["predictors"].items()}
    for number, ahead in enumerate(result["ahead"]):
        color = colors(0.9 * number / (len(result["ahead"]) - 1))
        label = f"next_router, {ahead} ahead"
        right.plot(guessed, recalls["next_router"][ahead], "o-", ms=3, color=color, label=label)
    right.plot(guessed, recalls["transition"][1], "s-", ms=3, color="tab:red", label="transition, 1 ahead")
    right.plot(guessed, recalls["last_token"][1], "^-", ms=3, color="tab:orange", label="last_token, 1 ahead")
    right.plot(guessed, [min(n / top_k, 1) for n in guessed], color="0.6", ls=":", label="every guess right")
    right.set(title="Recall of guesses", xlabel="experts prefetched", ylabel=f"share of a token's {top_k} experts")
    for axis in (left, right):
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
