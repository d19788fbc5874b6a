"""What each idea is worth: the ablation of arXiv 2312.17238, table 2, in this framework and on one machine.

    python -m benchmarks.decode.ablation                 # the made model of 2.25 GiB, 25% of the experts in the cache
    python -m benchmarks.decode.ablation --model FOLDER  # another one
    python -m benchmarks.decode.ablation --quick         # every line of it once, figures without meaning

`variants.py` has the rows.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks import MADE, RESULTS
from benchmarks.decode.variants import STATES, prefetching, variants, written_share
from benchmarks.harness import shape as shapes
from benchmarks.harness.make_model import made_model
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.series import measured_rows
from transformers_moe_offload.bench.passage import passage_for
from transformers_moe_offload.bench.session import facts, repeated
from transformers_moe_offload.bench.tables import Table, mib
from transformers_moe_offload.bench.workload import Workload


def measure_ablation(
    model: Annotated[Path | None, typer.Option(help="A folder with a checkpoint; default is a made model.")] = None,
    budget: Annotated[str, typer.Option(help="Cache budget of the rows that have a cache.")] = "25%",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one run.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each page cache state.")] = 3,
    most_minutes: Annotated[float, typer.Option(help="Begin no row after so long; run again to go on.")] = math.inf,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure all rows, each in a process of its own."""
    folder = model or made_model(shapes.QUICK if quick else shapes.Shape(), made)
    lengths = {"prompt_tokens": 16, "steps": 4 if quick else 16, "runs": 1 if quick else runs}
    common = {"folder": str(folder), "budget": budget} | lengths
    jobs = {row.name: common | {"variant": row.name} for row in variants()}
    result = measured_rows(
        "benchmarks.decode.ablation:measure_variant",
        jobs,
        folder,
        threads,
        parts=made / "parts",
        most_s=60 * most_minutes,
    )
    result["facts"] = {"model": folder.name, "budget": budget, "lengths": str(lengths)}
    result["facts"] |= {name: found["says"] for name, found in result["rows"].items()}
    if prefetching() is None:
        result["facts"]["lru + prefetch"] = "left out: this version has no prefetch"
    show(write(results, "ablation", result), result, [table(result, state) for state in STATES], [same_logits(result)])
    raise typer.Exit(1 if result["failed"] else 0)


def measure_variant(
    variant: str, folder: str, budget: str, prompt_tokens: int, steps: int, runs: int
) -> dict[str, Any]:
    """Runs of one variant by page cache state, and a digest of the logits, which no variant may change."""
    chosen = next(row for row in variants() if row.name == variant)
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=chosen.config(budget)).eval()
    chosen.apply(model)
    passage = passage_for(model, folder)
    with torch.inference_mode():
        logits = model(passage.sequences(1, prompt_tokens)).logits
    work = Workload(name="decode", prompt_tokens=prompt_tokens, steps=steps)
    answer: dict[str, Any] = {"says": chosen.says, "model": facts(model), "passage": passage.source}
    answer["digest"] = hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()
    for state in chosen.states:
        answer[state] = [asdict(one) for one in repeated(model, work, passage, runs, state)]
    return answer | {"written_share": written_share(model)}


def table(result: dict[str, Any], state: str) -> Table:
    """Speed and bytes of each row, and its speed as a multiple of the first row's."""
    rows, first_s = [], None
    for name, found in result["rows"].items():
        if state not in found:
            continue
        runs = found[state]
        token_s = median(one["elapsed_s"] / len(one["forward_s"]) for one in runs)
        first_s = first_s or token_s
        moved = median(one["disk_bytes"] / len(one["forward_s"]) for one in runs)
        rows.append([
            name,
            f"{1 / token_s:.2f}",
            f"{first_s / token_s:.2f}",
            f"{median(one['hits'] / one['asked'] for one in runs):.1%}",
            mib(moved),
            mib(moved * found["written_share"]),
            str(found["model"]["slots"]),
        ])  # fmt: skip
    header = ["row", "tokens/s", "times the first", "hit rate", "read", "written back", "slots"]
    return Table(f"Decoding, page cache {state} (read, written back: MiB per token)", header, rows)


def same_logits(result: dict[str, Any]) -> Verdict:
    """No row may change what is computed."""
    digests = {found["digest"] for found in result["rows"].values()}
    return "all rows have equal logits", len(digests) == 1 if digests else None


if __name__ == "__main__":
    typer.run(measure_ablation)
