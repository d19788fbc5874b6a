"""Do experts that are used most deserve more bits? Held-out perplexity of formats by single expert, at equal bits.

    python -m benchmarks.quality.hot_experts          # the small trained model, about 6 minutes
    python -m benchmarks.quality.hot_experts --quick  # every line of it once, figures without meaning

A trace of decoding text that the model was *trained* on, token by token, tells who is used most. Then some share of all
experts gets more bits: the hottest, or, to see whether it matters who, the coldest. Beside them stand formats that are
the same for all experts or differ by layer and take as many bits. Everything else is as in `quality.py`.
"""

# B windows, S positions

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks import RESULTS, TINY_MOE
from benchmarks.harness.outcome import show, write
from benchmarks.quality.held_out import LENGTH, load_text
from benchmarks.quality.measurement import FOUR_BITS, Measurement, Recipe
from transformers_moe_offload import ExpertFormats, OffloadConfig
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table, mib
from transformers_moe_offload.hf.upstream import kv_cache_argument
from transformers_moe_offload.tracing import Trace

MIXES = (
    ("2x32", "4x32", 0.25),
    ("2x32", "3x32", 0.5),
    ("2x32", "4x32", 0.375),
    ("2x32", "3x32", 0.75),
    ("2x16", "3x32", 0.5),
)
"""Format of most experts, of the others, and their share: 3.02 bits per expert weight twice, then 3.27 three times."""
REFERENCES = (("2x32",), ("2x16",), ("3x32", "3x32", "3x32", "2x32"), ("3x32",))
"""The same for all experts, or by quarter of the layers: 2.52, 3.03, 3.27 and 3.52 bits."""


@dataclass(frozen=True, kw_only=True)
class HotRecipe(Recipe):
    """A format for all experts, and another one for some."""

    hot: str
    chosen: tuple[tuple[int, tuple[int, ...]], ...]
    """By sparse layer."""
    kind: str
    """`hottest` or `coldest`."""
    share: float

    @property
    def config(self) -> OffloadConfig:
        formats = ExpertFormats(
            default=self._format(self.experts[0]),
            hot=self._format(self.hot),
            hot_experts={str(layer): list(experts) for layer, experts in self.chosen},
        )
        return OffloadConfig(cache_budget="100%", experts=formats)

    def __str__(self) -> str:
        return f"{self.experts[0]}, the {self.kind} {self.share:.1%} {self.hot}"


def measure_hot_experts(
    quick: Annotated[bool, typer.Option("--quick", help="One short window of each domain.")] = False,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 held-out tokens of each domain.")] = 40,
    text: Annotated[
        Path | None, typer.Option(help="A texts.json of examples/models/corpus.py; default is to collect it anew.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads torch may use.")] = 1,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Trace, and measure every mix and what takes as many bits."""
    torch.set_num_threads(threads)
    where = conditions(TINY_MOE, threads)
    counts = (1, 1, 64) if quick else (windows, 4, LENGTH)
    measurement = Measurement(load_text(text, held_out=counts[0], trained=counts[1], length=counts[2]))
    trace = traced(measurement.text.trained)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": where,
        "facts": {
            "torch threads": str(threads),
            "model": "examples/models/tiny-moe, computed in float32",
            "formats": "bits x group size, 8-bit scales and zeros (meta_nbits=8), hqq's solver; attention in 16 bits",
            "held-out text": f"{measurement.text.held_out[:, 1:].numel()} tokens predicted, {measurement.text.origin}",
            "traced": f"{measurement.text.trained.numel()} tokens of training text, decoded one by one",
            "±": "standard error of the difference, over windows",
        },
        "uses": {name: f"{part:.1%}" for name, part in uses(trace).items()},
        "rows": [measurement.row(recipe) for recipe in recipes(measurement, trace, MIXES[:1] if quick else MIXES)],
    }
    path = write(results, "hot-experts", result)
    show(path, result, tables(result), [])


def recipes(measurement: Measurement, trace: Trace, mixes: Sequence[tuple[str, str, float]]) -> list[Recipe]:
    """References, then each mix for the hottest and for the coldest experts."""
    quarter = measurement.num_layers // 4
    found: list[Recipe] = [
        Recipe(experts=tuple(form for form in forms for _ in range(quarter * 4 // len(forms)))) for forms in REFERENCES
    ]
    for form, hot, share in mixes:
        for kind, chosen in (("hottest", trace.hottest(share)), ("coldest", coldest(trace, share))):
            found.append(
                HotRecipe(
                    experts=(form,) * measurement.num_layers,
                    hot=hot,
                    chosen=tuple((int(layer), tuple(experts)) for layer, experts in chosen.items()),
                    kind=kind,
                    share=share,
                )
            )
    return found


@torch.no_grad()
def traced(windows: Tensor) -> Trace:
    """Which experts the plain model uses for windows (B, S), each decoded token by token."""
    model = AutoModelForCausalLM.from_pretrained(
        TINY_MOE, moe_offload=OffloadConfig(cache_budget="100%"), dtype=torch.float32, device_map="cpu"
    )
    typer.echo("tracing", err=True)
    with model.moe_offload.trace() as trace:
        for window in windows:
            past: dict[str, Any] = {}
            for token in window:
                past = kv_cache_argument(model, model(input_ids=token.view(1, 1), use_cache=True, **past))
    model.moe_offload.close()
    return trace


def coldest(trace: Trace, share: float) -> dict[str, list[int]]:
    """The experts that are not among the hottest others."""
    others = trace.hottest(1 - share)
    left = {
        str(layer): [expert for expert in range(count) if expert not in others.get(str(layer), [])]
        for layer, count in enumerate(trace.num_experts)
    }
    return {layer: experts for layer, experts in left.items() if experts}


def uses(trace: Trace) -> Mapping[str, float]:
    """How uneven the use is: the part of all uses that goes to the hottest experts."""
    counts = sorted((count for layer in trace.token_counts().values() for count in layer), reverse=True)
    return {
        f"hottest {share:.0%}": sum(counts[: round(share * len(counts))]) / sum(counts) for share in (0.1, 0.25, 0.5)
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each recipe, those of as many bits beside each other."""
    rows = sorted(result["rows"], key=lambda row: round(row["bits_per_expert_weight"], 1))
    return [
        Table(
            "Held-out perplexity by who has more bits",
            ["experts", "bits/expert weight", "MiB", "all", "over 16-bit", f"over {FOUR_BITS}"],
            [
                [
                    row["experts"],
                    f"{row['bits_per_expert_weight']:.2f}",
                    mib(row["bytes"]),
                    f"{row['perplexity']['all']:.3f}",
                    _percent(row["over_plain"]),
                    _percent(row["over_four_bits"]),
                ]
                for row in rows
            ],
        ),
        Table("Part of all uses that goes to", list(result["uses"]), [list(result["uses"].values())]),
    ]


def _percent(over: dict[str, float]) -> str:
    return f"{over['ratio'] - 1:+.2%} ± {100 * over['standard_error']:.2f}"


if __name__ == "__main__":
    logging.disable_progress_bar()
    typer.run(measure_hot_experts)
