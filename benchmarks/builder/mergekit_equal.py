"""Are gates with `scoring: mergekit` those that mergekit-moe 0.1.5 writes, bit for bit?

mergekit is LGPL and lives in an environment of its own; nothing of it is imported here:

    python -m venv mk; mk/bin/pip install torch==2.13.0; mk/bin/pip install mergekit==0.1.5 transformers==5.23.0
    python -m benchmarks.builder.mergekit_equal mk/bin/mergekit-moe  # 3 minutes; models are random and small

Same recipe file for both: ours reads mergekit's.
"""

from __future__ import annotations

import subprocess
import tempfile
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from benchmarks import RESULTS, TINY_MOE
from benchmarks.harness.outcome import show, write
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table
from transformers_moe_offload.builder import MoeRecipe, validate_recipe
from transformers_moe_offload.builder.gates import program_gates

FAMILIES = ("llama", "mistral", "qwen3")
MODES = ("hidden", "hidden_avg", "cheap_embed", "random", "uniform_random")
SEED = 3
LAYERS = 3
PROMPTS = {
    "positive_prompts": (
        ["import os\n\ndef main():", "class Reader:\n    def __init__(self, path):\n        self.path = path"],
        ["#ifndef _LINUX_QUEUE_H", "struct list { int length; };", "static inline int"],
    ),
    "negative_prompts": (None, ["The following arguments are used", "See also"]),
}


def compare(
    mergekit: Annotated[Path, typer.Argument(help="The command mergekit-moe of version 0.1.5.")],
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Run both on the same recipes, and compare routers."""
    python = mergekit.parent / "python"
    version = (
        "from importlib.metadata import version; "
        "print(*(f'{name} {version(name)}' for name in ('mergekit', 'torch', 'transformers')), sep=', ')"
    )
    theirs = subprocess.run([python, "-c", version], check=True, capture_output=True, text=True).stdout.strip()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for family in FAMILIES:
            make_models(Path(scratch) / family, family)
        for family, mode in product(FAMILIES, MODES):
            rows.append({"family": family, "mode": mode, **compared(Path(scratch) / family, mode, mergekit)})
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(),
        "facts": {
            "theirs": theirs,
            "models": f"random, {LAYERS} layers of hidden size 64, two experts with prompts, one with negative ones",
            "seed": SEED,
        },
        "rows": rows,
    }
    path = write(results, "mergekit-equal", result)
    header = ["router rows", *MODES]
    cells = [
        [family, *("equal" if row["equal"] else "DIFFERENT" for row in rows if row["family"] == family)]
        for family in FAMILIES
    ]
    numbers = sum(row["numbers"] for row in rows)
    everything = (f"all {numbers:,} numbers are equal, bit for bit", all(row["equal"] for row in rows))
    show(path, result, [Table("Ours and mergekit's", header, cells)], [everything])


def make_models(folder: Path, family: str) -> None:
    """A base model and two sources."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    for seed, name in enumerate(("base", "first", "second")):
        fields = {"sliding_window": None} if family == "mistral" else {}
        config = CONFIG_MAPPING[family](
            hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, head_dim=16,
            num_key_value_heads=2, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2, **fields,
        )  # fmt: skip
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def compared(folder: Path, mode: str, mergekit: Path) -> dict[str, Any]:
    """Whether all routers are equal, and how many numbers they have."""
    experts = [
        {"source_model": str(folder / name)} | {kind: lists[n] for kind, lists in PROMPTS.items() if lists[n]}
        for n, name in enumerate(("first", "second"))
    ]
    values = {"base_model": str(folder / "base"), "gate_mode": mode, "dtype": "bfloat16", "experts": experts}
    recipe, out = folder / f"{mode}.yml", folder / f"out-{mode}"
    recipe.write_text(yaml.safe_dump(values))
    subprocess.run([mergekit, recipe, out, "--random-seed", str(SEED)], check=True, capture_output=True)
    written = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    theirs = [written[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(LAYERS)]

    values = MoeRecipe.from_file(recipe).to_dict()
    values["gate"]["seed"] = SEED
    plan = validate_recipe(MoeRecipe.from_dict(values))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    gates = program_gates(
        plan.recipe.gate, plan.recipe.experts, plan.base, tokenizer, plan.ffn, advance=lambda layers: None
    )
    ours = [gates.rows[layer].bfloat16() for layer in range(LAYERS)]
    return {
        "equal": all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)),
        "numbers": sum(rows.numel() for rows in theirs),
    }


if __name__ == "__main__":
    typer.run(compare)
