"""How well gates route, as they are and with their routers trained: held-out bits per byte of a mixture of three
specialists.

After figure 2 of arXiv 2408.17280.

    python -m benchmarks.builder.gates          # examples/models/tiny-dense and its three adapters, about 6 minutes
    python -m benchmarks.builder.gates --quick  # every line of it once, figures without meaning

Every gate gets the same texts of the models' training data, as prompts; held-out texts are of other files. Computed in
float32 on one thread of the CPU, so that a rerun gives the same figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks import RESULTS, TINY_MOE
from benchmarks.builder.router_training import RouterTraining
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.quality.held_out import DOMAINS, collect
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table
from transformers_moe_offload.builder import MoeRecipe
from transformers_moe_offload.builder.recipe import Expert, Gate, Origin
from transformers_moe_offload.builder.sweep import sweep_gates
from transformers_moe_offload.builder.sweep.scoring import HeldOut, held_out, score

BASE = TINY_MOE.parent / "tiny-dense"
PIECE_CHARACTERS = 1000
"""Of a text; with the tokenizer of these models 250 to 450 tokens, so that none is longer than they take (512)."""

GATES = {
    "gateless, all experts": Gate(mode="gateless"),
    "noise": Gate(mode="noise"),
    "random": Gate(mode="random"),
    "mergekit hidden": Gate(mode="hidden", scoring="mergekit"),
    "mergekit hidden_avg": Gate(mode="hidden_avg", scoring="mergekit"),
    "mergekit cheap_embed": Gate(mode="cheap_embed", scoring="mergekit"),
    "mean, layer input": Gate(mode="mean", site="layer_input"),
    "mean": Gate(mode="mean"),
    "ridge": Gate(),
}
OURS = "ridge"
"""What a recipe gets that says nothing of its gate."""

STEPS = 60
"""Of router training, from each gate anew."""

SENT_HOME, NEAR = 0.8, 1.05
"""Promised: the least share of tokens that get home at the best layer, and the most bits per byte in each domain, as a
multiple of its specialist's."""


def compare_gates(
    quick: Annotated[bool, typer.Option("--quick", help="A few texts, figures without meaning.")] = False,
    text: Annotated[Path | None, typer.Option(help="A texts.json of corpus.py; else this machine's text.")] = None,
    calibration: Annotated[int, typer.Option(help="Texts of 1,000 characters that each gate gets of a domain.")] = 40,
    evaluation: Annotated[int, typer.Option(help="Held-out texts of each domain.")] = 40,
    both: Annotated[bool, typer.Option("--both", help="With one expert a token, too, not with two alone.")] = False,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Score gates of every kind on held-out text, beside the base model and the specialists."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    steps = STEPS
    if quick:
        calibration, evaluation, steps = 2, 2, 1
    texts = collect() if text is None else json.loads(text.read_text())
    known = {domain: pieces(texts[domain]["train"], calibration) for domain in DOMAINS}
    unseen = {domain: pieces(texts[domain]["held_out"], evaluation) for domain in DOMAINS}
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    windows = {domain: held_out(some, tokenizer, length=512) for domain, some in unseen.items()}
    train = RouterTraining.on(known, tokenizer, steps)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(BASE, 1),
        "facts": {
            "models": "examples/models/tiny-dense and its three specialists (LoRA on feed-forward blocks only), as a "
            "Mixtral of 3 experts in each of 6 layers; float32",
            "calibration": f"{calibration} texts of up to {PIECE_CHARACTERS:,} characters of each domain, from the "
            "models' training text",
            "held-out text": f"{evaluation} texts of each domain: "
            + ", ".join(f"{domain} {w.tokens:,} tokens" for domain, w in windows.items()),
            "router training": str(train),
        },
        "dense": dense_rows(windows),
        "sweeps": {},
        "trained": {},
    }
    for experts_per_token in [1, 2] if both else [2]:
        for kind, prepare in (("sweeps", None), ("trained", train)):
            report = sweep_gates(recipe(known, experts_per_token), GATES, unseen, prepare=prepare)
            result[kind][str(experts_per_token)] = report.as_dict()
    path = write(results, "gates", result)
    result = json.loads(path.read_text())
    show(path, result, tables(result), verdicts(result))


def pieces(files: Sequence[str], count: int) -> list[str]:
    """So many texts, evenly spread over the files."""
    every = [file[at : at + PIECE_CHARACTERS] for file in files for at in range(0, len(file), PIECE_CHARACTERS)]
    long_enough = [piece for piece in every if len(piece) > PIECE_CHARACTERS // 2]
    if len(long_enough) < count:
        raise typer.BadParameter(f"{count} texts are asked for, and there are {len(long_enough)}; ask for fewer")
    step = (len(long_enough) - 1) / max(1, count - 1)
    return [long_enough[round(number * step)] for number in range(count)]


def recipe(texts: Mapping[str, Sequence[str]], experts_per_token: int) -> MoeRecipe:
    """The three specialists around their base model."""
    experts = [
        Expert(
            name=domain,
            source=Origin(model=str(BASE), adapter=f"{BASE}-{domain}"),
            positive_prompts=tuple(some),
        )
        for domain, some in texts.items()
    ]
    return MoeRecipe(base_model=Origin(model=str(BASE)), experts=tuple(experts), experts_per_token=experts_per_token)


def dense_rows(windows: Mapping[str, HeldOut]) -> dict[str, dict[str, float]]:
    """Bits per byte by domain of what is no mixture: base model, specialists, and the mean of their weights."""

    def model(adapters: Sequence[str]) -> Any:
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        if not adapters:
            return base.eval()
        found = PeftModel.from_pretrained(base, f"{BASE}-{adapters[0]}", adapter_name=adapters[0])
        for name in adapters[1:]:
            found.load_adapter(f"{BASE}-{name}", adapter_name=name)
        if len(adapters) > 1:
            # Concatenated low ranks: exactly the mean of the three differences.
            weights = [1 / len(adapters)] * len(adapters)
            found.add_weighted_adapter(list(adapters), weights, "mean", combination_type="cat")
            found.set_adapter("mean")
        return found.eval()

    kinds = {
        "base model": (),
        **{f"specialist {domain}": (domain,) for domain in DOMAINS},
        "mean of specialists": DOMAINS,
    }
    found = {}
    for name, adapters in kinds.items():
        of_kind = model(adapters)
        found[name] = {domain: score(of_kind, some).bits_per_byte for domain, some in windows.items()}
    return found


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Dense models, then gates by experts per token."""
    header = ["", *DOMAINS, "mean"]
    found = [
        Table(
            "Bits per byte of dense models",
            header,
            [[name, *figures(row)] for name, row in result["dense"].items()],
        )
    ]
    for kind, routers in (("sweeps", "not trained"), ("trained", "trained")):
        for count, sweep in result[kind].items():
            title = f"Bits per byte of mixtures, {count} of 3 experts a token (gateless: all 3), routers {routers}"
            found.append(Table(title, [*header, "sent home", "best layer", "entropy"], mixture_rows(sweep)))
    return found


def mixture_rows(sweep: Mapping[str, Any]) -> list[list[str]]:
    """One for each gate."""
    return [
        [
            row["name"],
            *figures(row["bits_per_byte"]),
            f"{fmean(row['sent_home'].values()):.1%}",
            f"{max(row['sent_home'].values()):.1%}",
            f"{fmean(row['entropy'].values()):.2f}",
        ]
        for row in sweep["rows"]
    ]


def figures(by_domain: Mapping[str, float]) -> list[str]:
    """Bits per byte in each domain, and their mean."""
    return [*(f"{by_domain[domain]:.4f}" for domain in DOMAINS), f"{fmean(by_domain.values()):.4f}"]


def verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """What is promised of the gate that a recipe gets by default."""
    dense = result["dense"]
    best_single = min(fmean(dense[f"specialist {domain}"].values()) for domain in DOMAINS)
    found: list[Verdict] = []
    for count, sweep in result["sweeps"].items():
        (ours,) = [row for row in sweep["rows"] if row["name"] == OURS]
        others = [row for row in sweep["rows"] if row["name"] != OURS]
        home = max(ours["sent_home"].values())
        ratios = {d: ours["bits_per_byte"][d] / dense[f"specialist {d}"][d] for d in DOMAINS}
        mean = fmean(ours["bits_per_byte"].values())
        best_other = min(fmean(row["bits_per_byte"].values()) for row in others)
        found += [
            (
                f"{count} of 3: {home:.1%} of tokens get home at the best layer (at least {SENT_HOME:.0%})",
                home >= SENT_HOME,
            ),
            (
                f"{count} of 3: bits per byte are "
                + ", ".join(f"{ratio:.3f} ({domain})" for domain, ratio in ratios.items())
                + f" times the domain's own specialist's (at most {NEAR})",
                max(ratios.values()) <= NEAR,
            ),
            (
                f"{count} of 3: {mean:.4f} bits per byte of the mixture, best specialist {best_single:.4f}",
                mean < best_single,
            ),
            (f"{count} of 3: {mean:.4f} bits per byte, best other gate {best_other:.4f}", mean < best_other),
        ]
    return found


if __name__ == "__main__":
    typer.run(compare_gates)
