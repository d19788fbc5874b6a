"""Draw the curves and the router's statistics as PNG files beside this script.

python plots.py        # curves alone, from the CSV files; evaluate.py calls the rest
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sources import DOMAINS
from torch import Tensor

HERE = Path(__file__).resolve().parent
COLORS = {"prose": "tab:blue", "python": "tab:orange", "c": "tab:green"}


def curve(name: str) -> list[dict[str, str]]:
    with (HERE / f"curve-{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=90, bbox_inches="tight")
    plt.close(figure)


def draw_training(name: str) -> None:
    """Loss and held-out perplexity of one model against the step, as `curve-NAME.png`."""
    rows = curve(name)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    steps = [int(row["step"]) for row in rows]
    left.plot(steps, [float(row["loss"]) for row in rows], color="0.8", label="one step")
    left.plot(steps, [float(row["smooth_loss"]) for row in rows], color="k", label="smoothed")
    left.set(title=f"{name}: training loss", xlabel="step", ylabel="nats per token")
    for domain in DOMAINS:
        right.plot(*measured(name, domain), "o-", ms=3, color=COLORS[domain], label=domain)
    right.set(title="held-out perplexity (progress sample)", xlabel="step", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, f"curve-{name}.png")


def measured(name: str, domain: str) -> tuple[list[int], list[float]]:
    """Steps and held-out perplexities of the curve's evaluations."""
    rows = [row for row in curve(name) if row[f"{domain}_perplexity"]]
    return [int(row["step"]) for row in rows], [float(row[f"{domain}_perplexity"]) for row in rows]


def draw_specialists() -> None:
    """Held-out perplexity of each specialist on the three domains, as a fraction of the base's, against the step."""
    figure, axes = plt.subplots(1, len(DOMAINS), figsize=(11, 3.4), sharey=True)
    for axis, specialist in zip(axes, DOMAINS, strict=True):
        for domain in DOMAINS:
            base = measured("tiny-dense", domain)[1][-1]
            steps, values = measured(f"tiny-dense-{specialist}", domain)
            ratios = [1.0, *(value / base for value in values)]
            axis.plot([0, *steps], ratios, "o-", ms=3, color=COLORS[domain], label=domain)
        axis.axhline(1, color="0.5", lw=0.8)
        axis.set(title=f"tiny-dense-{specialist}", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out perplexity / base's")
    axes[1].legend(title="text", loc="center right")
    save(figure, "curve-specialists.png")


def draw_router_load(load: Tensor) -> None:
    """load (L, E) float, 1 is uniform."""
    num_layers, num_experts = load.shape
    figure, axis = plt.subplots(figsize=(9, 4))
    image = axis.imshow(load, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    for layer in range(num_layers):
        for expert in range(num_experts):
            axis.text(expert, layer, f"{load[layer, expert]:.2f}", ha="center", va="center", fontsize=6.5)
    axis.set(
        title="tiny-moe: load of each expert on held-out text (1 = uniform)",
        xlabel="expert",
        ylabel="layer",
        xticks=range(num_experts),
        yticks=range(num_layers),
    )
    figure.colorbar(image, fraction=0.03)
    save(figure, "router-load.png")


def draw_router_domains(domain_share: Tensor) -> None:
    """domain_share (L, E, D) float, each expert's tokens by domain."""
    figure, axes = plt.subplots(1, len(DOMAINS), figsize=(13, 3.4), sharey=True, layout="constrained")
    for axis, domain, share in zip(axes, DOMAINS, domain_share.unbind(-1), strict=True):
        image = axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set(title=domain, xlabel="expert", xticks=range(0, share.shape[1], 2), yticks=range(share.shape[0]))
    axes[0].set_ylabel("layer")
    figure.suptitle("tiny-moe: where each expert's tokens come from (1/3 = no preference)")
    figure.colorbar(image, ax=axes, fraction=0.02)
    save(figure, "router-domains.png")


def main() -> None:
    draw_training("tiny-moe")
    draw_training("tiny-dense")
    draw_specialists()


if __name__ == "__main__":
    main()
