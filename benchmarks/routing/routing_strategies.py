"""What it costs to choose experts otherwise than the model does: held-out perplexity by strategy and domain.

    python -m benchmarks.routing.routing_strategies          # the small trained model, a few minutes
    python -m benchmarks.routing.routing_strategies --quick  # every line of it once, figures without meaning

The instruments must detect what is known: a trained router beats chance, and chance in proportion to its scores lies in
between. Everything is computed in float32 on one thread of the CPU, so that a rerun gives the same figures.
"""

# B windows

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks import RESULTS, TINY_MOE
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.quality.held_out import LENGTH, Text, load_text, losses
from transformers_moe_offload import routing
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OWN = "top_k (the model's own 4)"
CHANCE = "random, uniform"

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    OWN: ("top_k", {}),
    "top_k, k=1": ("top_k", {"k": 1}),
    "top_k, k=2": ("top_k", {"k": 2}),
    "top_k, k=8": ("top_k", {"k": 8}),
    "top_p, p=0.6": ("top_p", {"p": 0.6}),
    "top_p, p=0.8": ("top_p", {"p": 0.8}),
    "gumbel, temperature 0.3": ("gumbel", {"temperature": 0.3}),
    "gumbel, temperature 1": ("gumbel", {"temperature": 1.0}),
    "noise, std 0.5": ("noise", {"std": 0.5}),
    "expert_choice": ("expert_choice", {}),
    "linear_assignment": ("linear_assignment", {}),
    "k_means": ("k_means", {}),
    "drop experts 0 to 3": ("drop", {"experts": [0, 1, 2, 3]}),
    "fixed experts 0 to 3": ("fixed", {"experts": [0, 1, 2, 3]}),
    "hash": ("hash", {}),
    CHANCE: ("random", {}),
}
"""What is compared, by the name it has in the table."""


def measure_strategies(
    quick: Annotated[bool, typer.Option("--quick", help="Try every line once, with next to no text.")] = False,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
    text: Annotated[Path | None, typer.Option(help="A texts.json of examples/models/corpus.py.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 1,
) -> None:
    """Held-out perplexity of the small trained model under every strategy."""
    torch.set_num_threads(threads)
    where = conditions(TINY_MOE, threads)
    count, length = (1, 48) if quick else (16, LENGTH)
    windows = load_text(text, held_out=count, trained=count, length=length)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
    centroids = _centroids(model, windows.trained)
    found: dict[str, Tensor] = {}
    for name, (strategy, options) in STRATEGIES.items():
        typer.echo(f"measuring {name}", err=True)
        own = {"centroids": centroids} if strategy == "k_means" else options
        with routing.set_routing(model, strategy, **own):
            found[name] = torch.cat([losses(model, window) for window in windows.held_out.split(1)])
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": where,
        "facts": {
            "model": "examples/models/tiny-moe, computed in float32; 16 experts in each of 8 layers, 4 for each token",
            "held-out text": f"{windows.held_out.numel() - len(windows.held_out)} tokens predicted, {windows.origin}",
            "batches": f"a window of {length} tokens, which expert_choice and linear_assignment see at once",
            "±": "standard error of the difference in nats a token, over windows",
        },
        "rows": {name: _row(windows, losses_, found[OWN]) for name, losses_ in found.items()},
    }
    path = write(results, "routing-strategies", result)
    show(path, result, tables(result), [verdict(result)])
    draw_bars(result, path.with_suffix(".png"))
    page = path.with_suffix(".md")
    page.write_text(f"{page.read_text()}\n![Loss by strategy]({path.stem}.png)\n")


def _centroids(model: Any, trained: Tensor) -> dict[int, Tensor]:
    """Centroids of what the routers are given for text that the model was trained on."""
    with routing.record_routing(model, scores=None, hidden_states=True) as recorder:
        losses(model, trained)
    return routing.fit_centroids(recorder.trace)


def _row(windows: Text, found: Tensor, own: Tensor) -> dict[str, Any]:
    rise = found - own
    return {
        "perplexity": {name: part.mean().exp().item() for name, part in windows.by_domain(found).items()},
        "rise": rise.mean().item(),
        "standard_error": rise.std(correction=0).item() / len(rise) ** 0.5,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """A row for each strategy, the cheapest first."""
    domains = list(result["rows"][OWN]["perplexity"])
    ordered = sorted(result["rows"].items(), key=lambda item: item[1]["rise"])
    rows = [[name, *(f"{row['perplexity'][domain]:.2f}" for domain in domains), _rise(row)] for name, row in ordered]
    return [
        Table(
            "Held-out perplexity by who chooses the experts",
            ["strategy", *domains, "nats a token over the model's own"],
            rows,
        )
    ]


def verdict(result: dict[str, Any]) -> Verdict:
    """The model's own choice is best, and chance is worst of what draws lots, both by more than chance explains."""
    rows = result["rows"]
    chance, drawn = rows[CHANCE], rows["gumbel, temperature 1"]
    others = [name for name in ("gumbel, temperature 1", "noise, std 0.5", "hash", CHANCE) if rows[name]["rise"] <= 0]
    is_kept = not others and chance["rise"] > 3 * chance["standard_error"] and chance["rise"] > drawn["rise"]
    return (
        f"random routing hurts, and hurts more than routing in proportion to the scores; {_rise(chance)} and "
        f"{_rise(drawn)} nats a token",
        is_kept,
    )


def draw_bars(result: dict[str, Any], path: Path) -> None:
    """How much each strategy loses, domain by domain."""
    own = result["rows"][OWN]["perplexity"]
    ordered = sorted(result["rows"].items(), key=lambda item: item[1]["rise"])
    names = [name for name, _ in ordered]
    domains = [domain for domain in own if domain != "all"]
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    for number, domain in enumerate(domains):
        rises = [torch.tensor(row["perplexity"][domain] / own[domain]).log().item() for _, row in ordered]
        places = [place + 0.26 * (number - 1) for place in range(len(names))]
        axes.barh(places, rises, 0.26, label=domain)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="k", lw=0.8)
    axes.set(xlabel="nats a token over the model's own choice", title="tiny-moe: loss on held-out text, by strategy")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rise(row: dict[str, Any]) -> str:
    return f"{row['rise']:+.3f} ± {row['standard_error']:.3f}"


if __name__ == "__main__":
    logging.disable_progress_bar()
    typer.run(measure_strategies)
