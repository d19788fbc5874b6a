"""What does fine-tuning cost with offloaded experts, beside the same on the plain model?

    python -m benchmarks.training.finetune          # about four minutes, 1.2 GiB of disk for the made model
    python -m benchmarks.training.finetune --quick  # every line of it once, figures without meaning

The small trained model learns a domain that it has not seen, in the three manners of `examples/finetune_*.py`. An
expert-heavy model of random weights is trained on random tokens, for memory and time; its losses mean nothing.
"""

# N steps, B windows, S positions

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks import CHECKOUT, MADE, RESULTS, TINY_MOE
from benchmarks.harness import shape as shapes
from benchmarks.harness.make_model import made_model
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.series import measured_rows
from benchmarks.harness.shape import Shape
from transformers_moe_offload.bench.tables import Table, mib

sys.path.append(str(CHECKOUT / "examples"))

from finetuning import CONTEXT, blocks_of, texts

METHODS = {"router": "routers", "lora": "LoRA on experts and attention", "chosen": "two experts a layer, and routers"}

BATCH = 4
"""Windows of each step."""

ROUNDING = 0.01
"""Nats by which losses of a step may differ. Transformers' own implementations of experts differ by 0.006 on the same
model in bfloat16 after five steps."""

MOST_MEMORY, MOST_TIME = 0.4, 1.5
"""Of the plain model's, for LoRA with a quarter of the experts resident."""

COPIED, MAPPED, PLAIN = "offloaded 25% copied", "offloaded 25% mapped", "plain"


def compare_finetuning(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, two steps.")] = False,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps with the small trained model.")] = 16,
    heavy_steps: Annotated[int, typer.Option(min=2, help="With the expert-heavy one; the first is not timed.")] = 5,
    text: Annotated[Path | None, typer.Option(help="A folder of text to learn; default is Perl's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    most_minutes: Annotated[float, typer.Option(help="Begin no row after so long; run again to go on.")] = math.inf,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Train both models, offloaded and plain."""
    steps, heavy_steps, batch = (2, 2, 2) if quick else (steps, heavy_steps, BATCH)
    shape = shapes.QUICK_TRAINED if quick else shapes.TRAINED
    heavy = made_model(shape, made)
    windows = {"tiny": made / "windows-tiny.safetensors", "heavy": made / "windows-heavy.safetensors"}
    save_file(learnt(text, steps, batch, 4 if quick else 16), windows["tiny"])
    save_file(random_tokens(shape, heavy_steps, batch), windows["heavy"])
    rows = jobs(windows, heavy)
    result = measured_rows(
        "benchmarks.training.finetune_row:train_row",
        rows,
        TINY_MOE,
        threads,
        parts=made / "parts",
        most_s=60 * most_minutes,
    )
    result["facts"] = {
        "training": f"steps of {batch} windows of {CONTEXT} tokens, AdamW, warm-up and cosine, no checkpointing",
        "tiny-moe": f"{steps} steps on {'the given text' if text else 'Perl modules'}, weights in bfloat16, "
        "arithmetic exact beside the plain model's eager experts, a cache for 50% of the experts",
        "expert-heavy": f"{heavy_steps} steps of LoRA (r=4) on random tokens; "
        f"{shape.all_expert_bytes / 2**20:,.0f} MiB of experts, {shape.experts} in each of {shape.layers} layers, "
        f"{shape.experts_per_token} chosen; files in the page cache",
    }
    show(write(results, "finetune", result), result, tables(result), verdicts(result))
    raise typer.Exit(1 if result["failed"] else 0)


def learnt(folder: Path | None, steps: int, batch: int, num_held_out: int) -> dict[str, Tensor]:
    """Windows of the examples' text: trained (N, B, S) and held_out (B, S)."""
    blocks = [block["input_ids"] for block in blocks_of(AutoTokenizer.from_pretrained(TINY_MOE), texts(folder))]
    wanted = num_held_out + steps * batch
    if len(blocks) < wanted:
        raise typer.BadParameter(f"the text has {len(blocks)} windows of {CONTEXT} tokens, and {wanted} are needed")
    held_out, trained = torch.stack(blocks[:wanted]).split([num_held_out, steps * batch])
    return {"held_out": held_out.clone(), "trained": trained.reshape(steps, batch, -1).clone()}


def random_tokens(shape: Shape, steps: int, batch: int) -> dict[str, Tensor]:
    """As `learnt`, without anything held out."""
    random = torch.Generator().manual_seed(0)
    trained = torch.randint(shape.vocab, (steps, batch, CONTEXT), generator=random)
    return {"held_out": torch.empty(0, CONTEXT, dtype=torch.int64), "trained": trained}


def jobs(windows: dict[str, Path], heavy: Path) -> dict[str, dict[str, Any]]:
    """All rows; the plain expert-heavy model computes as Transformers chooses, which is its fastest."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        tiny = {"folder": str(TINY_MOE), "text": str(windows["tiny"]), "method": method}
        found[f"{method}, plain"] = tiny | {"implementation": "eager"}
        found[f"{method}, offloaded"] = tiny | {"offload": {"cache_budget": "50%", "arithmetic": "exact"}}
    lora = {"folder": str(heavy), "text": str(windows["heavy"]), "method": "lora"}
    found[PLAIN] = lora
    found[COPIED] = lora | {"offload": {"cache_budget": "25%", "mmap": False}}
    found[MAPPED] = lora | {"offload": {"cache_budget": "25%", "mmap": True}}
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    """The small model by method, and the expert-heavy one."""
    rows = result["rows"]
    small = [
        [
            f"{METHODS[method]}, {where}",
            f"{row['trainable_parameters']:,}",
            mib(row["train_rss"]),
            f"{seconds(row):.2f}",
            f"{row['held_out'][0]:.3f}",
            f"{row['held_out'][1]:.3f}",
        ]
        for method in METHODS
        for where in ("plain", "offloaded")
        if (row := rows.get(f"{method}, {where}")) is not None
    ]
    large = [
        [
            name,
            f"{row['trainable_parameters']:,}",
            mib(row["imports_rss"]),
            mib(row["load_rss"]),
            mib(row["train_rss"]),
            f"{seconds(row):.2f}",
            f"{hit_rate(row['cache']):.0%}" if row["cache"] else "",
        ]
        for name in (PLAIN, COPIED, MAPPED)
        if (row := rows.get(name)) is not None
    ]
    return [
        Table(
            "tiny-moe learns a domain (peak RSS of the whole process in MiB; loss in nats per held-out token)",
            ["what is trained", "parameters", "peak RSS", "s/step", "loss before", "after"],
            small,
        ),
        Table(
            "LoRA on an expert-heavy model (RSS of the whole process in MiB)",
            ["experts", "parameters", "imports", "peak loading", "peak training", "s/step", "hits"],
            large,
        ),
    ]


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """What is promised of the small model's losses, and of the expert-heavy one's memory and time."""
    rows, found = result["rows"], list[Verdict]()
    for method in METHODS:
        plain, offloaded = rows.get(f"{method}, plain"), rows.get(f"{method}, offloaded")
        if plain is None or offloaded is None:
            found.append((f"{method}: learns as the plain model does", None))
            continue
        before, after = offloaded["held_out"]
        found.append((f"{method}: held-out loss falls: {before:.3f} to {after:.3f}", after < before))
        pairs = zip(plain["losses"] + plain["held_out"], offloaded["losses"] + offloaded["held_out"], strict=True)
        apart = max(abs(one - other) for one, other in pairs)
        promise = f"{method}: every loss is the plain model's within {ROUNDING} nats: at most {apart:.1g} apart"
        found.append((promise, apart <= ROUNDING))
    for name in (COPIED, MAPPED):
        if name not in rows or PLAIN not in rows:
            found.append((f"{name}: memory and time of LoRA training beside the plain model's", None))
            continue
        offloaded, plain = rows[name], rows[PLAIN]
        share = offloaded["train_rss"] / plain["train_rss"]
        beyond = (offloaded["train_rss"] - offloaded["imports_rss"]) / (plain["train_rss"] - plain["imports_rss"])
        promise = f"{name}: peak memory of LoRA training at most {MOST_MEMORY:.0%} of the plain model's: {share:.1%}"
        found.append((f"{promise} ({beyond:.1%} without what imports take)", share <= MOST_MEMORY))
        times = seconds(offloaded) / seconds(plain)
        found.append((f"{name}: at most {MOST_TIME:g} times the seconds a step: {times:.2f}", times <= MOST_TIME))
    return found


def seconds(row: dict[str, Any]) -> float:
    """The median step without the first, which reads what no later one has to."""
    return median(row["step_s"][1:])


def hit_rate(cache: dict[str, Any]) -> float:
    """Of the experts that were asked for, those that were there."""
    return cache["hits"] / max(1, cache["hits"] + cache["late_hits"] + cache["misses"])


if __name__ == "__main__":
    typer.run(compare_finetuning)
