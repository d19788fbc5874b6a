"""Are the two special ways to read experts worth their code?

    python -m benchmarks.disk.ways_of_reading          # about ten minutes, 3 GiB of disk for the made models
    python -m benchmarks.disk.ways_of_reading --quick  # every line of it once, figures without meaning

- Past the page cache, the kernel reads by itself (`disk_io/aio_queue.py`); the other way is reader threads that read
  into the same pages.
- Through the page cache, small experts are read without a thread (`slots/inline_reads.py`); the other way is reader
  threads for them, too.

Both ways, and the first one a second time, take turns in one process. The second time is the control: what differs
there is chance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from transformers import AutoModelForCausalLM

from benchmarks import MADE, RESULTS, TINY_MOE
from benchmarks.adapters.make_adapters import SMALL, MixtureShape, made_mixture
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.series import compared_models, measured_rows
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.layers import experts_of, files_of, sparse_layers, store_of
from transformers_moe_offload.bench.page_cache import drop, warm
from transformers_moe_offload.bench.passage import passage_for
from transformers_moe_offload.bench.session import facts, unmap_dense
from transformers_moe_offload.bench.tables import Table
from transformers_moe_offload.bench.workload import Workload, run
from transformers_moe_offload.slots.buffers import CopiedSlots
from transformers_moe_offload.slots.direct_io import DirectSlots
from transformers_moe_offload.slots.transfer import HostCopier, no_start

WORTH_IT = 1.05
"""The other way must take so many times as long for the special one to be kept."""

ADAPTERS = 100


def compare_ways(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 7,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure both pairs of ways."""
    models = compared_models(quick, made)
    mixture = made_mixture(SMALL if quick else MixtureShape(), 30 if quick else ADAPTERS, made)
    lengths = {"steps": 2 if quick else 32, "rounds": 1 if quick else rounds}
    jobs = {
        f"{name}, past the page cache": {"folder": str(folder), "past_cache": True, "is_cold": True}
        for name, folder in models.items()
    }
    for name, folder in {"tiny-moe": TINY_MOE, f"{ADAPTERS} LoRA adapters": mixture}.items():
        for state in ("cold", "warm"):
            jobs[f"{name}, {state} page cache"] = {
                "folder": str(folder),
                "past_cache": False,
                "is_cold": state == "cold",
            }
    result = measured_rows(
        "benchmarks.disk.ways_of_reading:measure_row",
        {name: job | lengths for name, job in jobs.items()},
        TINY_MOE,
        threads,
    )
    result["facts"] = {
        "lengths": f"{lengths['steps']} tokens after 16 at batch 1, {lengths['rounds']} runs of each way"
    }
    show(write(results, "ways-of-reading", result), result, [_table(result)], _verdicts(result))
    raise typer.Exit(1 if result["failed"] else 0)


def measure_row(folder: str, past_cache: bool, is_cold: bool, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step by way: the special one, the other one, and the special one again."""
    config = OffloadConfig(cache_budget="25%", mmap=False, direct_io=past_cache)
    models = {
        way: AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
        for way in ("special", "threads", "control")
    }
    changed = _by_threads(models["threads"])
    files = files_of(store_of(models["special"]))
    passage = passage_for(models["special"], folder)
    work = Workload(name="decode", prompt_tokens=16, steps=steps)
    before_forward: Callable[[], None] = (lambda: drop(files)) if is_cold else (lambda: warm(files))
    seconds: dict[str, list[float]] = {way: [] for way in models}
    for model in models.values():
        unmap_dense(model)
        run(model, work, passage, before_forward)
    order = list(models)
    for _ in range(rounds):
        for way in order:
            seconds[way].append(median(run(models[way], work, passage, before_forward).forward_s))
        order = order[1:] + order[:1]
    return {"model": facts(models["special"]), "seconds": seconds, "caches": changed}


def _by_threads(model: Any) -> int:
    """Let reader threads read all experts of a model; returns how many caches that changes."""
    caches = list(dict.fromkeys(experts_of(module).cache for module, _ in sparse_layers(model)))
    for cache in caches:
        if isinstance(cache.slots, DirectSlots):
            assert cache.slots.reader._queue is not None, "there are no asynchronous reads here"
            cache.slots.reader._queue = None
        else:
            assert isinstance(cache.slots, CopiedSlots)
            assert isinstance(cache.slots._copier, HostCopier)
            cache.slots._copier._small = no_start
    return len(caches)


def _table(result: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            *(f"{1e3 * median(found['seconds'][way]):.2f}" for way in ("special", "control", "threads")),
            f"{_times(found, 'threads'):.2f}",
            f"{_times(found, 'control'):.2f}",
        ]
        for name, found in result["rows"].items()
    ]
    columns = ["row", "special", "again", "threads", "threads, times as long", "again, times as long"]
    return Table("Milliseconds of a decode step with slots for a quarter of the experts", columns, rows)


def _times(found: dict[str, Any], way: str) -> float:
    return float(median(found["seconds"][way]) / median(found["seconds"]["special"]))


def _verdicts(result: dict[str, Any]) -> list[Verdict]:
    return [
        (f"{name}: threads take at least {WORTH_IT} times as long: {times:.2f}", times >= WORTH_IT)
        for name, found in result["rows"].items()
        for times in [_times(found, "threads")]
    ]


if __name__ == "__main__":
    typer.run(compare_ways)
