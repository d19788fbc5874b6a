"""What quantized experts cost in quality: held-out perplexity by bits per weight, after table 1 of arXiv 2312.17238.

    python benchmarks/quality.py            # the small trained model, about 10 minutes
    python benchmarks/quality.py --quick    # every line of it once, figures without meaning

Every recipe is loaded as anyone would, `from_pretrained(..., moe_offload=OffloadConfig(experts=..., dense=...))`, and
computes in float32 on one thread of the CPU, so that a rerun gives the same figures.

Recipes that mix formats by layer: some by rule, and one that is searched. Each layer is quantized alone to each
format, what that costs on text the model was *trained* on is taken to add up, and of all mixes within the limit the
cheapest is taken. Held-out text has no part in the choice.
"""

# B windows

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import groupby, product
from math import expm1
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from held_out import LENGTH, Text, load_text, losses
from outcome import HERE, Verdict, show, write
from series import TINY_MOE
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from transformers_moe_offload import ExpertFormats, HqqFormat, OffloadConfig
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table, mib
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hf.prebuilt.source import Quantization

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLAIN = "16"
"""Bits of what is not quantized."""

EXPERTS = (PLAIN, "8x32", "4x32", "3x16", "3x32", "2x16", "2x32")
"""Bits x group size; groups of 64 do not fit: an expert's inner width is 96."""
QUICK_EXPERTS = (PLAIN, "4x32", "3x32", "2x32")
ATTENTION = (PLAIN, "4x64")
SOLVERS = ("hqq", "nearest")

SEARCHED = ("4x32", "3x32", "2x16", "2x32")
QUICK_SEARCHED = ("2x16",)
FOUR_BITS = "4x32"
LIMIT = 3.3
"""Bits per expert weight of mixed recipes."""
ALLOWED = 0.02
"""By how much the perplexity of the best of them may be above that of 4 bits."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats of the experts by layer, and of attention."""

    experts: tuple[str, ...]
    attention: str = PLAIN
    solver: str = "hqq"

    @property
    def config(self) -> OffloadConfig:
        layers = {str(number): self._format(text) for number, text in enumerate(self.experts)}
        return OffloadConfig(
            cache_budget="100%", experts=ExpertFormats(layers=layers), dense=self._format(self.attention)
        )

    def _format(self, text: str) -> HqqFormat | None:
        if text == PLAIN:
            return None
        return replace(HqqFormat.parse(text), optimize=self.solver == "hqq")

    def __str__(self) -> str:
        runs = [(text, [i for i, _ in run]) for text, run in groupby(enumerate(self.experts), key=lambda pair: pair[1])]
        if len(runs) == 1:
            return runs[0][0]
        return ", ".join(f"{f'{i[0]}-{i[-1]}' if len(i) > 1 else i[0]}: {text}" for text, i in runs)


class Measurement:
    """A model, a text, and what has been measured of them."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self._source = meta_model(str(TINY_MOE), local_files_only=True)
        self.num_layers = len(self._source.experts)
        self._losses: dict[Recipe, Tensor] = {}

    def uniform(self, experts: str, attention: str = PLAIN, solver: str = "hqq") -> Recipe:
        """All layers alike."""
        return Recipe(experts=(experts,) * self.num_layers, attention=attention, solver=solver)

    def sizes(self, recipe: Recipe) -> dict[str, float]:
        """Bytes and bits per weight as they are stored, scales and zeros included."""
        sizes = Sizes.of(Quantization.of(self._source, recipe.config))
        return {
            "bits_per_expert_weight": sizes.bits_per_expert_weight,
            "bits_per_weight": 8 * self._source.dtype.itemsize * sizes.nbytes / sizes.plain_bytes,
            "bytes": sizes.nbytes,
        }

    def row(self, recipe: Recipe) -> dict[str, Any]:
        """Sizes and perplexities of a recipe, and how far above those of 16 and of 4 bits they are."""
        typer.echo(f"measuring experts {recipe}, attention {recipe.attention}, {recipe.solver}", err=True)
        found = self._of(recipe)
        return {
            "experts": str(recipe),
            "attention": recipe.attention,
            "solver": recipe.solver,
            **self.sizes(recipe),
            "perplexity": {name: part.mean().exp().item() for name, part in self.text.by_domain(found).items()},
            "over_plain": _over(found, self._of(self.uniform(PLAIN))),
            "over_four_bits": _over(found, self._of(self.uniform(FOUR_BITS, recipe.attention))),
        }

    @cached_property
    def _plain_on_trained(self) -> float:
        """Nats per token of training text if nothing is quantized."""
        return self._measured(self.uniform(PLAIN), self.text.trained).mean().item()

    def rises(self, form: str) -> list[float]:
        """Nats per token of training text that each layer costs if only its experts are in this format."""
        typer.echo(f"searching {form}", err=True)
        before = self._plain_on_trained
        return [
            self._measured(recipe, self.text.trained).mean().item() - before
            for recipe in (Recipe(experts=_one(form, layer, self.num_layers)) for layer in range(self.num_layers))
        ]

    def _of(self, recipe: Recipe) -> Tensor:
        if recipe not in self._losses:
            self._losses[recipe] = self._measured(recipe, self.text.held_out)
        return self._losses[recipe]

    def _measured(self, recipe: Recipe, windows: Tensor) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(
            TINY_MOE, moe_offload=recipe.config, dtype=torch.float32, device_map="cpu"
        )
        found = losses(model.eval(), windows)
        model.moe_offload.close()
        return found


def measure_quality(
    quick: Annotated[
        bool, typer.Option("--quick", help="One short window of each domain, and less of a search.")
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 held-out tokens of each domain.")] = 40,
    text: Annotated[
        Path | None, typer.Option(help="A texts.json of examples/models/corpus.py; default is to collect it anew.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads torch may use.")] = 1,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = HERE / "results",
) -> None:
    """Measure every format of experts and attention, and mixed recipes."""
    torch.set_num_threads(threads)
    where = conditions(TINY_MOE, threads)
    counts = (1, 1, 128) if quick else (windows, max(1, windows // 8), LENGTH)
    measurement = Measurement(load_text(text, held_out=counts[0], trained=counts[1], length=counts[2]))
    experts = QUICK_EXPERTS if quick else EXPERTS
    held_out, trained = measurement.text.held_out, measurement.text.trained
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": where,
        "facts": {
            "torch threads": str(threads),
            "model": "examples/models/tiny-moe, computed in float32, weights stored in bfloat16 where not quantized",
            "formats": "bits x group size, 8-bit scales and zeros (meta_nbits=8); MiB: as stored, without padding",
            "held-out text": f"{held_out[:, 1:].numel()} tokens predicted, {measurement.text.origin}",
            "searched on": f"{trained[:, 1:].numel()} tokens of training text",
            "±": "standard error of the difference, over windows",
        },
        "uniform": [measurement.row(recipe) for recipe in uniform_recipes(measurement, experts)],
        "rises": {form: measurement.rises(form) for form in (QUICK_SEARCHED if quick else SEARCHED)},
    }
    mixes = mixed_recipes(measurement, result["rises"], ATTENTION[:1] if quick else ATTENTION)
    result["mixed"] = [measurement.row(recipe) for recipe in mixes]
    path = write(results, "quality", result)
    show(path, result, tables(result), [verdict(result)])
    draw_lines(result, path.with_suffix(".png"))
    page = path.with_suffix(".md")
    page.write_text(f"{page.read_text()}\n![Perplexity by bits per weight]({path.stem}.png)\n")


def uniform_recipes(measurement: Measurement, formats: Sequence[str]) -> list[Recipe]:
    """All layers alike; where nothing is quantized there is nothing to solve either."""
    return [
        measurement.uniform(experts, attention, solver)
        for attention, experts, solver in product(ATTENTION, formats, SOLVERS)
        if solver == "hqq" or {attention, experts} != {PLAIN}
    ]


def mixed_recipes(
    measurement: Measurement, rises: dict[str, list[float]], attentions: Sequence[str] = ATTENTION
) -> list[Recipe]:
    """By rule: the first, the last, or both ends at more bits, or the first or the last at fewer; and what is found."""
    num = measurement.num_layers
    quarter, half = num // 4, num // 2
    bits = {form: measurement.sizes(measurement.uniform(form))["bits_per_expert_weight"] for form in rises}
    mixes = [
        ("3x32",) * half + ("2x16",) * (num - half),
        ("2x16",) * (num - half) + ("3x32",) * half,
        ("3x32",) * quarter + ("2x16",) * (num - 2 * quarter) + ("3x32",) * quarter,
        ("2x32",) * quarter + ("3x32",) * (num - quarter),
        ("3x32",) * (num - quarter) + ("2x32",) * quarter,
        cheapest(rises, bits, LIMIT),
    ]
    return [Recipe(experts=mix, attention=attention) for attention in attentions for mix in dict.fromkeys(mixes)]


def cheapest(rises: dict[str, list[float]], bits: dict[str, float], limit: float) -> tuple[str, ...]:
    """Of all ways to give each layer a format, with at most `limit` bits on average, the one that costs least."""
    num_layers = len(next(iter(rises.values())))
    fitting = (mix for mix in product(rises, repeat=num_layers) if sum(map(bits.get, mix)) <= limit * num_layers)
    return min(fitting, key=lambda mix: sum(rises[form][layer] for layer, form in enumerate(mix)))


def tables(result: dict[str, Any]) -> list[Table]:
    """Table 1 of the paper with both solvers side by side; mixes; and what each layer costs by itself."""
    domains = list(result["uniform"][0]["perplexity"])
    sizes = ["bits/expert weight", "bits/weight", "MiB"]
    nearest = {(row["attention"], row["experts"]): row for row in result["uniform"] if row["solver"] == "nearest"}
    uniform = []
    for row in result["uniform"]:
        other = nearest.get((row["attention"], row["experts"]))
        if row["solver"] == "hqq":
            beside = [f"{other['perplexity']['all']:.3f}", _percent(other["over_plain"])] if other else ["", ""]
            uniform.append([_name(row), *_figures(row), _percent(row["over_plain"]), *beside])
    mixed = [
        [_name(row), *_figures(row), _percent(row["over_plain"]), _percent(row["over_four_bits"])]
        for row in result["mixed"]
    ]
    by_layer = [
        [str(layer), *(f"{expm1(rises[layer]):+.2%}" for rises in result["rises"].values())]
        for layer in range(len(next(iter(result["rises"].values()))))
    ]
    return [
        Table(
            "Held-out perplexity by formats of attention and experts; hqq's solver, and rounding to nearest beside it",
            ["attention / experts", *sizes, *domains, "over 16-bit", "nearest: all", "over 16-bit"],
            uniform,
        ),
        Table(
            f"Mixed by layer, at most {LIMIT} bits per expert weight",
            ["attention / experts", *sizes, *domains, "over 16-bit", f"over {FOUR_BITS}"],
            mixed,
        ),
        Table(
            "Perplexity of training text with the experts of one layer quantized, over none",
            ["layer", *result["rises"]],
            by_layer,
        ),
    ]


def verdict(result: dict[str, Any]) -> Verdict:
    """The best mix against 4 bits in all layers, attention as it is."""
    mixes = [row for row in result["mixed"] if row["attention"] == PLAIN and row["bits_per_expert_weight"] <= LIMIT]
    promise = f"a mix of at most {LIMIT} bits per expert weight is at most {ALLOWED:.0%} above {FOUR_BITS}"
    if not mixes:
        return promise, None
    best = min(mixes, key=lambda row: row["perplexity"]["all"])
    said = f"{best['experts']} ({best['bits_per_expert_weight']:.2f} bits): {_percent(best['over_four_bits'])}"
    return f"{promise}; {said}", best["over_four_bits"]["ratio"] <= 1 + ALLOWED


def draw_lines(result: dict[str, Any], path: Path) -> None:
    """Perplexity against bits per expert weight: a line for each solver and attention, mixes as points."""
    figure, axis = plt.subplots(figsize=(8.2, 4.8), layout="constrained")
    colors = {"hqq": "tab:blue", "nearest": "tab:red"}
    for (solver, color), (attention, style) in product(colors.items(), zip(ATTENTION, ("o-", "s--"), strict=True)):
        rows = [row for row in result["uniform"] if (row["solver"], row["attention"]) == (solver, attention)]
        points = sorted((row["bits_per_expert_weight"], row["perplexity"]["all"]) for row in rows)
        axis.plot(*zip(*points, strict=True), style, color=color, ms=4, lw=1.3, label=f"{solver}, {_bits(attention)}")
        if solver == "hqq" and attention == PLAIN:
            for row in rows:
                at = (row["bits_per_expert_weight"], row["perplexity"]["all"])
                axis.annotate(row["experts"], at, (0, -12), textcoords="offset points", fontsize=7, ha="center")
    for attention, marker in zip(ATTENTION, ("*", "x"), strict=True):
        rows = [row for row in result["mixed"] if row["attention"] == attention]
        bits = [row["bits_per_expert_weight"] for row in rows]
        label = f"mixed by layer, hqq, {_bits(attention)}"
        axis.plot(bits, [row["perplexity"]["all"] for row in rows], marker, color="tab:green", ms=7, label=label)
    axis.set_xscale("log")
    axis.set_xticks([2.5, 3, 3.5, 4, 5, 6, 8, 16], ["2.5", "3", "3.5", "4", "5", "6", "8", "16"])
    axis.minorticks_off()
    axis.set(xlabel="bits per expert weight, scales and zeros included", ylabel="held-out perplexity")
    axis.set_title("tiny-moe: quality of quantized experts")
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _one(form: str, layer: int, num_layers: int) -> tuple[str, ...]:
    return tuple(form if number == layer else PLAIN for number in range(num_layers))


def _over(found: Tensor, reference: Tensor) -> dict[str, float]:
    """Ratio of two perplexities and its standard error, as the windows differ. found, reference (B,) nats per token."""
    rise = found - reference
    ratio = rise.mean().exp().item()
    return {"ratio": ratio, "standard_error": ratio * rise.std(correction=0).item() / len(rise) ** 0.5}


def _percent(over: dict[str, float]) -> str:
    return f"{over['ratio'] - 1:+.2%} ± {100 * over['standard_error']:.2f}"


def _figures(row: dict[str, Any]) -> Sequence[str]:
    perplexities = [f"{value:.3f}" for value in row["perplexity"].values()]
    return f"{row['bits_per_expert_weight']:.2f}", f"{row['bits_per_weight']:.2f}", mib(row["bytes"]), *perplexities


def _name(row: dict[str, Any]) -> str:
    return f"{row['attention']} / {row['experts']}"


def _bits(attention: str) -> str:
    return f"attention {attention}" if attention != PLAIN else f"attention {PLAIN}-bit"


if __name__ == "__main__":
    logging.disable_progress_bar()
    typer.run(measure_quality)
