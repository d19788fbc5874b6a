"""How fast is a mixture built, beside copying its sources' files, and how much memory does it take?

    python -m benchmarks.builder.build          # mixtures of 4 and of 7 experts, 2.6 and 4.3 GB; two minutes
    python -m benchmarks.builder.build --quick  # every line of it once, figures without meaning

Mixtures are of two made models. The page cache is dropped before each run; the mixture is removed after each, the made
models at the end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import MADE, RESULTS
from benchmarks.harness.job import run_job
from benchmarks.harness.outcome import Verdict, show, write
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.page_cache import drop
from transformers_moe_offload.bench.tables import Table

CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
SMALL = CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1000}

NUM_EXPERTS = 4
MANY_EXPERTS = 7
"""Of the row for memory: more than 4 GB."""
MOST_BYTES = 10**9
"""Above the interpreter with everything imported."""

LEAST_SHARE = 0.6
"""Of the speed with which files of the same size are copied."""


def measure_building(
    quick: Annotated[bool, typer.Option("--quick", help="Small models, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 3,
    folder: Annotated[Path, typer.Option(help="Where models are made; on the disk that is measured.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Copy and build in turns, each build in a process of its own."""
    rounds = 1 if quick else rounds
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as made:
        place = Path(made)
        sources = [made_model(place / f"source-{seed}", seed, SMALL if quick else CONFIG) for seed in range(2)]
        copies, builds = [], []
        for _ in range(rounds):
            builds.append(built(sources, place / "mixture", NUM_EXPERTS))
            copies.append(copied(sources, builds[-1]["nbytes"], place / "copy"))
        large = built(sources, place / "mixture", MANY_EXPERTS)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": conditions(folder),
        "facts": {
            "mixture": f"{NUM_EXPERTS} experts of 2 made models, bfloat16, {builds[0]['nbytes']:,} bytes, random "
            f"gates; with {MANY_EXPERTS} experts {large['nbytes']:,}",
            "rounds": f"{rounds}, build and copy in turns, medians; {MANY_EXPERTS} experts once",
            "memory": "most resident memory of the process (VmHWM) less that with everything imported",
            "build": "the whole of build_moe, checks included; written files are synced, as copied ones are",
        },
        "rows": {"copy": copies, "build": builds, f"build, {MANY_EXPERTS} experts": [large]},
    }
    show(write(results, "build", result), result, list(tables(result)), list(verdicts(result)))


def made_model(folder: Path, seed: int, config: dict[str, int]) -> Path:
    """A Llama with random weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config, architectures=["LlamaForCausalLM"]))
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    state = {
        name: (0.02 * torch.randn(tensor.shape, generator=generator)).bfloat16() if tensor.dim() > 1
        else torch.ones(tensor.shape, dtype=torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }  # fmt: skip
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    os.sync()
    return folder


def copied(sources: list[Path], nbytes: int, target: Path) -> dict[str, float]:
    """Copy as many bytes as the mixture has, of the sources' files, and sync them."""
    files = [source / "model.safetensors" for source in sources]
    drop(files)
    started, done = time.perf_counter(), 0
    with target.open("wb", buffering=0) as out:
        while done < nbytes:
            for file in files:
                with file.open("rb", buffering=0) as stream:
                    while done < nbytes and (chunk := stream.read(min(8 << 20, nbytes - done))):
                        out.write(chunk)
                        done += len(chunk)
        os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return {"seconds": seconds, "mb_per_s": done / seconds / 1e6}


def built(sources: list[Path], target: Path, num_experts: int) -> dict[str, float]:
    """Build in another process."""
    drop([source / "model.safetensors" for source in sources])
    job = {"sources": list(map(str, sources)), "target": str(target), "num_experts": num_experts}
    found: dict[str, float] = run_job("benchmarks.builder.build:build", job, None)
    shutil.rmtree(target)
    return found


def build(sources: list[str], target: str, num_experts: int) -> dict[str, float]:
    """The other process."""
    from transformers_moe_offload.builder import MoeRecipe, build_moe

    experts = [{"source": sources[number % len(sources)], "name": f"e{number}"} for number in range(num_experts)]
    recipe = MoeRecipe.from_dict(
        {
            "schema": 1,
            "base_model": sources[0],
            "experts": experts,
            "gate": {"mode": "random"},
            "checks": {"similarity": "off"},
        }
    )
    before = resident("VmRSS")
    started = time.perf_counter()
    info = build_moe(recipe, target, advance=lambda nbytes: None)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "mb_per_s": info.nbytes / seconds / 1e6,
        "nbytes": info.nbytes,
        "most_bytes": resident("VmHWM") - before,
    }


def resident(field: str) -> int:
    """Bytes of this process, by a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """One row each."""
    rows = []
    for name, runs in result["rows"].items():
        memory = f"{median(run['most_bytes'] for run in runs) / 2**20:,.0f}" if "most_bytes" in runs[0] else ""
        seconds = [run["seconds"] for run in runs]
        rows.append([
            name,
            f"{median(seconds):.1f}",
            f"{min(seconds):.1f} to {max(seconds):.1f}",
            f"{median(run['mb_per_s'] for run in runs):,.0f}",
            memory,
        ])  # fmt: skip
    yield Table("Copying and building", ["row", "seconds", "range", "MB/s", "MiB of memory"], rows)


def verdicts(result: dict[str, Any]) -> Iterator[Verdict]:
    """The issue's two promises."""
    copies, builds, [large] = result["rows"].values()
    share = median(run["mb_per_s"] for run in builds) / median(run["mb_per_s"] for run in copies)
    yield f"at least {LEAST_SHARE:.0%} of the speed of copying: {share:.0%}", share >= LEAST_SHARE
    most = max(run["most_bytes"] for run in [*builds, large])
    yield f"at most {MOST_BYTES / 1e9:.0f} GB of memory above the interpreter: {most / 1e9:.2f} GB", most <= MOST_BYTES


if __name__ == "__main__":
    typer.run(measure_building)
