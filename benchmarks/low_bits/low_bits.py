"""Decode a model shaped like OLMoE with its experts in fewer bits, beside plain Transformers in bfloat16.

    python -m benchmarks.low_bits.low_bits          # about ten minutes, 7 GB of disk for the made checkpoints
    python -m benchmarks.low_bits.low_bits --quick  # every line of it once, figures without meaning

Everything is resident: what is compared is arithmetic, and how many bytes it reads. The checkpoints in low bits are
written once by `moe-offload quantize`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from transformers import AutoModelForCausalLM

from benchmarks import MADE, RESULTS
from benchmarks.decode.loading import FetchCounter
from benchmarks.decode.measure import run
from benchmarks.decode.protocol import Protocol
from benchmarks.decode.rows import IMPLEMENTATIONS
from benchmarks.harness import shape as shapes
from benchmarks.harness.make_model import made_model
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.series import measured_rows
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.tables import Table, mib

FASTER = 1.5
"""Times the tokens per second of the best plain row, with experts of 4 bits."""

BITS = (8, 4, 3, 2)
COMPARED = "4-bit experts"


def compare_bits(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 5,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure plain Transformers, bfloat16 experts of ours, and experts in low bits."""
    plain = made_model(shapes.QUICK_OLMOE if quick else shapes.OLMOE, made)
    lengths = {"decode_tokens": 4 if quick else 48, "rounds": 1 if quick else rounds}
    jobs: dict[str, dict[str, Any]] = {
        f"plain {name}": {"folder": str(plain), "implementation": name} for name in IMPLEMENTATIONS
    }
    jobs["ours, bfloat16"] = {"folder": str(plain)}
    group_size = 32 if quick else 64
    for nbits in BITS:
        jobs[f"{nbits}-bit experts"] = {"folder": str(_quantized(plain, experts=f"{nbits}x{group_size}"))}
    four = f"4x{group_size}"
    jobs[f"{COMPARED} and dense layers"] = {"folder": str(_quantized(plain, experts=four, dense=four))}
    jobs[f"{COMPARED}, int8 activations"] = jobs[COMPARED] | {"arithmetic": "int8"}
    result = measured_rows(
        "benchmarks.low_bits.low_bits:measure_row", {name: job | lengths for name, job in jobs.items()}, plain, threads
    )
    result["facts"] = {"lengths": str(lengths), "model": plain.name, "groups": f"{group_size} weights, 8-bit scales"}
    show(write(results, "low-bits", result), result, [_table(result)], _verdicts(result))
    raise typer.Exit(1 if result["failed"] else 0)


def measure_row(
    folder: str,
    rounds: int,
    decode_tokens: int,
    implementation: str | None = None,
    arithmetic: str = "fast",
) -> dict[str, Any]:
    """Runs of one checkpoint, by an experts implementation of Transformers' own, or by this package without one."""
    started = time.perf_counter()
    if implementation is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation).eval()
        expert_bytes = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    else:
        config = OffloadConfig(cache_budget="100%", arithmetic=arithmetic)  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
        expert_bytes = model.moe_offload.plan.expert_bytes
    load_s = time.perf_counter() - started
    protocol, nothing = Protocol(decode_tokens=decode_tokens), FetchCounter(model)
    run(model, protocol, nothing)
    runs = [run(model, protocol, nothing) for _ in range(rounds)]
    return {"runs": runs, "expert_bytes": expert_bytes, "load_s": load_s}


def _quantized(plain: Path, **formats: str) -> Path:
    """The checkpoint in these formats; written if it is not there, or not all of it. Rounding to nearest is as fast."""
    options = [word for name, text in formats.items() for word in (f"--{name}", text)]
    folder = plain.with_name("-".join([plain.name, *formats.values()]))
    if not (folder / "moe_offload.safetensors.index.json").exists():
        command = [str(Path(sys.executable).with_name("moe-offload")), "quantize", str(plain), str(folder)]
        subprocess.run([*command, *options, "--no-optimize"], check=True, stdout=subprocess.DEVNULL)
    return folder


def _table(result: dict[str, Any]) -> Table:
    best = _best_plain(result)
    rows = []
    for name, found in result["rows"].items():
        speeds = sorted(one["tokens"] / one["elapsed_s"] for one in found["runs"])
        rows.append([
            name,
            f"{1 / _seconds(found):.2f}",
            f"{speeds[0]:.2f} to {speeds[-1]:.2f}",
            f"{best / _seconds(found):.2f}" if best else "",
            mib(found["expert_bytes"]),
            f"{found['load_s']:.1f}",
        ])  # fmt: skip
    return Table(
        "Decoding at batch 1, everything resident (experts: MiB of all of them)",
        ["row", "tokens/s", "min to max", "times the best plain", "experts", "load s"],
        rows,
    )


def _verdicts(result: dict[str, Any]) -> list[Verdict]:
    best, found = _best_plain(result), result["rows"].get(COMPARED)
    promise = f"{COMPARED} at least {FASTER:g} times the tokens/s of the best plain row"
    if not best or found is None:
        return [(promise, None)]
    times = best / _seconds(found)
    return [(f"{promise}: {times:.2f}", times >= FASTER)]


def _best_plain(result: dict[str, Any]) -> float | None:
    """Seconds per token."""
    return min((_seconds(found) for name, found in result["rows"].items() if name.startswith("plain ")), default=None)


def _seconds(found: dict[str, Any]) -> float:
    return median(one["elapsed_s"] / one["tokens"] for one in found["runs"])


if __name__ == "__main__":
    typer.run(compare_bits)
