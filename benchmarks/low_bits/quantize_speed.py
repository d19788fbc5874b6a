"""How fast are matrices quantized on one core, and how near do they come?

    python -m benchmarks.low_bits.quantize_speed          # matrices of OLMoE's experts, about two minutes
    python -m benchmarks.low_bits.quantize_speed --quick  # every line of it once, figures without meaning

Compared with the `hqq` package where it is installed: `pip install --no-deps hqq==0.2.8.post1 termcolor`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.harness.outcome import Verdict, show, write
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table
from transformers_moe_offload.config.formats import HqqFormat
from transformers_moe_offload.formats.hqq import quantize
from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.reference import dequantize
from transformers_moe_offload.kernels.solver import FusedSolver, Solver

SHAPES = ((2048, 1024), (1024, 2048))
FORMATS = ("8x128m16", "4x64", "3x64", "2x64", "2x16")
KINDS = ("gaussian", "student")

LEAST = {"fused": 20.0, "torch": 4.0}
"""Million weights a second and core."""

FURTHER = 0.01
"""By how much more than hqq's an error may be."""

Restored = Callable[[], Tensor]
"""The weights that a quantized matrix stands for."""

Way = Callable[[Tensor, HqqFormat], Restored]


def measure_quantizing(
    quick: Annotated[bool, typer.Option("--quick", help="Small matrices, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 3,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure all ways of quantizing in one thread, by the processor time that they take."""
    torch.set_num_threads(1)
    where = conditions(num_threads=1)
    shapes = [(rows // 16, cols // 4) for rows, cols in SHAPES] if quick else SHAPES
    rounds = 1 if quick else rounds
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d-%H%M"),
        "conditions": where,
        "facts": {
            "matrices": ", ".join(f"{rows} x {cols}" for rows, cols in shapes) + ", bfloat16, standard deviation 0.02",
            "weights": "gaussian; student: Student's t with 5 degrees of freedom",
            "rounds": str(rounds),
            "time": "of the processor, one thread; the median over the rounds of all matrices of a kind",
        },
        "rows": {
            f"{text}, {kind}, {name}": measured(way, [made(kind, *shape) for shape in shapes], text, rounds)
            for text in FORMATS
            for kind in KINDS
            for name, way in ways().items()
        },
    }
    promises = [*fast_enough(result), near_enough(result)]
    show(write(results, "quantize-speed", result), result, list(tables(result)), promises)


def ways() -> dict[str, Way]:
    """What can be compared here, hqq first."""
    library = native.library()
    found: dict[str, Way] = {"hqq": by_hqq} if find_spec("hqq") else {}
    found["torch"] = ours(Solver())
    if library is not None:
        found["fused"] = ours(FusedSolver(library))
        found["fused, to the nearest"] = ours(FusedSolver(library), optimize=False)
    found["torch, to the nearest"] = ours(Solver(), optimize=False)
    return found


def by_hqq(weight: Tensor, format: HqqFormat) -> Restored:
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight,
        nbits=format.nbits,
        group_size=format.group_size,
        axis=1,
        round_zero=format.nbits == 4,
        device="cpu",
    )
    return lambda: Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})


def ours(solver: Solver | FusedSolver, *, optimize: bool = True) -> Way:
    def way(weight: Tensor, format: HqqFormat) -> Restored:
        of_kind = HqqFormat(
            nbits=format.nbits, group_size=format.group_size, meta_nbits=format.meta_nbits, optimize=optimize
        )
        matrix = quantize(weight, of_kind, solver=solver)
        return lambda: dequantize(matrix, torch.float32)

    return way


def made(kind: str, rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    if kind == "student":
        weight /= (torch.randn(5, rows, cols, generator=generator).square().sum(0) / 5).sqrt()
    return (0.02 * weight).bfloat16()


def measured(way: Way, weights: list[Tensor], text: str, rounds: int) -> dict[str, float]:
    """Million weights a second, and the Frobenius norm of the error as a share of the weights'."""
    format, seconds = HqqFormat.parse(text), []
    for _ in range(rounds):
        started = time.process_time()
        quantized = [way(weight, format) for weight in weights]
        seconds.append(time.process_time() - started)
    errors = sum(
        float((restored() - weight).double().square().sum())
        for restored, weight in zip(quantized, weights, strict=True)
    )
    norms = sum(float(weight.double().square().sum()) for weight in weights)
    count = sum(weight.numel() for weight in weights)
    return {"mparam_per_s": count / median(seconds) / 1e6, "error": (errors / norms) ** 0.5}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Of each kind of weights, speeds and errors by format."""
    for kind in KINDS:
        for title, key, digits in (
            ("million weights a second and core", "mparam_per_s", 1),
            ("relative error", "error", 5),
        ):
            header = ["row", *FORMATS]
            rows = [
                [name, *(f"{result['rows'][f'{text}, {kind}, {name}'][key]:.{digits}f}" for text in FORMATS)]
                for name in names(result)
            ]
            yield Table(f"{kind.capitalize()} weights: {title}, by bits x group size", header, rows)


def names(result: dict[str, Any]) -> list[str]:
    """The ways that were measured."""
    return list(dict.fromkeys(row.split(", ", 2)[2] for row in result["rows"]))


def fast_enough(result: dict[str, Any]) -> Iterator[Verdict]:
    """The slowest format decides."""
    for name, least in LEAST.items():
        speeds = {row: found["mparam_per_s"] for row, found in result["rows"].items() if row.split(", ", 2)[2] == name}
        slowest = min(speeds, key=lambda row: speeds[row], default=None)
        promise = f"{name}: at least {least:.0f} million weights a second and core"
        if slowest is None:
            yield promise, None
        else:
            yield f"{promise}; the slowest is {slowest}: {speeds[slowest]:.1f}", speeds[slowest] >= least


def near_enough(result: dict[str, Any]) -> Verdict:
    """The worst format decides."""
    rows, further = result["rows"], {}
    for row, found in rows.items():
        text, kind, name = row.split(", ", 2)
        reference = rows.get(f"{text}, {kind}, hqq")
        if name in LEAST and reference:
            further[row] = found["error"] / reference["error"] - 1
    promise = f"errors at most {FURTHER:.0%} larger than hqq's"
    if not further:
        return promise, None
    worst = max(further, key=lambda row: further[row])
    return f"{promise}; the worst is {worst}: {further[worst]:+.2%}", further[worst] <= FURTHER


if __name__ == "__main__":
    typer.run(measure_quantizing)
