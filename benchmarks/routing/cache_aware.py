"""What cache-aware routing costs and gains: held-out text, step by step, from a disk that nothing is cached of.

    python -m benchmarks.routing.cache_aware          # the small trained model, about five minutes
    python -m benchmarks.routing.cache_aware --quick  # every line of it once, figures without meaning
    python -m benchmarks.routing.cache_aware --model benchmarks/made/olmoe-4x32  # that of train_olmoe.py

The meter of the package (`moe-offload tradeoff`) on text that the model was not trained on. One half of the held-out
files recommends a strength; then every strength is measured on the other half. There the experts' files are dropped
from the page cache before every step, while the clock stands still, as if the model were much larger than RAM.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import RESULTS, TINY_MOE
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.quality.held_out import load_text
from transformers_moe_offload import OffloadConfig, routing
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.layers import files_of, store_of
from transformers_moe_offload.bench.page_cache import drop
from transformers_moe_offload.bench.session import unmap_dense
from transformers_moe_offload.bench.tables import Table, mib
from transformers_moe_offload.cli.tradeoff import HEADER
from transformers_moe_offload.routing import Tradeoff

STRENGTHS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
CHOOSING, MEASURED = slice(0, None, 2), slice(1, None, 2)
"""Held-out files of each domain."""
PREDICTED = {
    "tiny-moe": "half of the misses at +0.9 % of perplexity, 1.3 times the speed, as half of a step is arithmetic",
    "olmoe-4x32": "half of the misses at +1 % of perplexity, 1.6 times the speed",
}
"""At the recommended strength, from a simulation of caches on the text that recommends, and bytes over bandwidth."""
MOST_MISSES, LEAST_SPEED = 0.5, 1.5
"""Of those without it, at a strength by which the perplexity rises by 1 % at most."""


def measure_cache_aware(
    model: Annotated[str, typer.Option(help="A model with the tokenizer of examples/models.")] = str(TINY_MOE),
    quick: Annotated[bool, typer.Option("--quick", help="Try every line once, with next to no text.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens predicted at each strength.")] = 3072,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
    text: Annotated[Path | None, typer.Option(help="A texts.json of examples/models/corpus.py.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 1,
) -> None:
    """Measure a model, by default the small trained one, with a quarter of its experts resident."""
    torch.set_num_threads(threads)
    tokens, length = (40, 21) if quick else (tokens, 257)
    strengths = STRENGTHS[1:3] if quick else STRENGTHS
    if AutoTokenizer.from_pretrained(model).get_vocab() != AutoTokenizer.from_pretrained(TINY_MOE).get_vocab():
        raise typer.BadParameter(f"--model {model} has another tokenizer than {TINY_MOE}; name one that has the same")
    config = OffloadConfig(cache_budget="25%", mmap=False, direct_io=False)
    offloaded = AutoModelForCausalLM.from_pretrained(model, moe_offload=config)
    unmap_dense(offloaded)
    files = files_of(store_of(offloaded))

    def measured(half: slice, before_step: Callable[[], None]) -> tuple[Tradeoff, str]:
        count = -(-tokens // (length - 1) // 3)
        windows = load_text(text, held_out=count, trained=1, length=length, files=half)
        held_out = list(windows.held_out)
        found = routing.tradeoff(offloaded, held_out, strengths, tokens=tokens, window=length, before_step=before_step)
        return found, windows.origin

    chosen, _ = measured(CHOOSING, lambda: None)
    found, origin = measured(MEASURED, lambda: drop(files))
    experts = offloaded.moe_offload.layers
    result: dict[str, Any] = found.to_dict() | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(files[0], threads),
        "facts": {
            "model": f"{Path(model).name}; {experts[0].num_experts} experts in each of {len(experts)} layers, "
            f"{offloaded.config.num_experts_per_tok} for each token; 25 % resident",
            "held-out text": f"{found.num_tokens} tokens predicted at each strength, {origin}; as many of other files "
            "recommend one",
            "steps": f"teacher-forced, in windows of {length} tokens, each from an empty cache; cold page cache",
            "predicted": PREDICTED.get(Path(model).name, "nothing"),
            "± and to": "95 %, a bootstrap over blocks of 32 tokens",
        },
        "recommended": chosen.recommended.strength,
        "chosen by": chosen.to_dict(),
    }
    tables = [
        table("Each strength beside none", result),
        table("The same on the text that recommends one, page cache warm", result["chosen by"]),
    ]
    show(write(results, "cache-aware", result), result, tables, verdicts(result))


def table(title: str, result: dict[str, Any]) -> Table:
    """A row for each strength."""
    rows = [
        [
            f"{one['strength']:g}",
            f"{one['hit_rate'][0]:.1%}",
            f"{one['misses'][0]:.1%}",
            mib(one["bytes_per_token"][0]),
            f"{one['tokens_per_s'][0]:.1f}",
            f"{one['speed'][0]:.2f} ({one['speed'][1]:.2f} to {one['speed'][2]:.2f})",
            f"{one['loss'][0]:+.2%} ({one['loss'][1]:+.2%} to {one['loss'][2]:+.2%})",
            f"{one['kl'][0]:.4f}",
            f"{one['agreement'][0]:.1%}",
        ]
        for one in result["figures"]
    ]
    return Table(title, HEADER, rows)


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """What is promised of the recommended strength."""
    best = next(one for one in result["figures"] if one["strength"] == result["recommended"])
    at = f"at strength {best['strength']:g}, perplexity {best['loss'][0]:+.2%}"
    misses, speed = best["misses"][0], best["speed"][0]
    return [
        (f"at most {MOST_MISSES:.0%} of the misses for 1 % of perplexity: {misses:.1%} {at}", misses <= MOST_MISSES),
        (f"{LEAST_SPEED:g} times the speed from disk: {speed:.2f} times {at}", speed >= LEAST_SPEED),
    ]


if __name__ == "__main__":
    typer.run(measure_cache_aware)
