"""How fast matrices in low bits are multiplied on this processor, beside dense ones and the speed of its memory.

Weights come from memory, as they do when a model decodes: the methods take turns on matrices that together are larger
than any cache, so that each finds its own pushed out.
"""

# T rows of input, N rows and K columns of a matrix

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload import kernels
from transformers_moe_offload.bench.bandwidth import read_bandwidth
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.limit import as_share
from transformers_moe_offload.bench.tables import Table, mib
from transformers_moe_offload.kernels import PackedMatrix, Packing, reference


@dataclass(frozen=True)
class KernelProtocol:
    """Shapes of matrices, numbers of input rows, and repetitions."""

    shapes: tuple[tuple[int, int], ...] = ((14336, 4096), (768, 2048))
    """Rows and columns: an expert's up projection in Mixtral 8x7B, and in Qwen3 30B-A3B."""
    inputs: tuple[int, ...] = (1, 8, 64)
    rounds: int = 5
    cold_bytes: int = 512 << 20
    """Bytes of all methods' matrices together."""


QUICK = KernelProtocol(shapes=((768, 2048),), inputs=(1, 8), rounds=1, cold_bytes=16 << 20)

NBITS = (8, 4, 3, 2, 1)
GROUP_SIZE, META_NBITS = 64, 8


class Method(NamedTuple):
    """One way to multiply, and the matrices it takes in turns."""

    name: str
    product: Callable[[Tensor, Any], Tensor]
    matrices: Sequence[Any]
    nbytes: int
    """Of one matrix."""
    dtype: torch.dtype
    """Of the rows of input."""


def measure_kernels(protocol: KernelProtocol, begin: Callable[[str], None]) -> dict[str, Any]:
    """All figures, on one core and on all of torch's threads; `begin` is called with what comes next."""
    all_threads = torch.get_num_threads()
    result: dict[str, Any] = {
        "conditions": conditions(),
        "kernels": kernels.available(),
        "protocol": vars(protocol),
        "measured": [],
    }
    with torch.inference_mode():
        for threads in sorted({1, all_threads}):
            with _threads(threads):
                begin(f"memory, {threads} threads")
                memory = read_bandwidth(protocol.cold_bytes // 2, 2 * protocol.rounds, _clock(threads))
                for shape in protocol.shapes:
                    begin(f"{shape[0]} x {shape[1]}, {threads} threads")
                    found = {"shape": shape, "threads": threads, "memory_bytes_per_s": memory.bytes_per_s}
                    found["fastest_read"] = memory.way
                    result["measured"].append(found | {"methods": _measure(*shape, protocol, threads)})
    return result


def kernel_tables(result: dict[str, Any]) -> list[Table]:
    """One table for each shape and number of threads."""
    return [_table(found, result["protocol"]["inputs"]) for found in result["measured"]]


def _table(found: dict[str, Any], inputs: Sequence[int]) -> Table:
    rows, cols = found["shape"]
    memory = found["memory_bytes_per_s"]
    title = f"{rows} x {cols}, threads: {found['threads']}, memory: {memory / 1e9:.1f} GB/s (ms by rows of input)"
    header = ["method", "MiB", *(f"{count} rows" if count > 1 else "1 row" for count in inputs), "GB/s", "reached"]
    lines = []
    for method in found["methods"]:
        seconds = method["seconds"]
        speed = method["nbytes"] / seconds[0]
        ms = [f"{1e3 * taken:.3f}" for taken in seconds]
        lines.append(
            [method["name"], mib(method["nbytes"]), *ms, f"{speed / 1e9:.1f}", as_share(speed / memory, of="memory")]
        )
    return Table(title, header, lines)


def _measure(rows: int, cols: int, protocol: KernelProtocol, threads: int) -> list[dict[str, Any]]:
    """Of each method, the median seconds for each number of rows of input."""
    methods, clock = _methods(rows, cols, protocol.cold_bytes), _clock(threads)
    found: list[dict[str, Any]] = [{"name": one.name, "nbytes": one.nbytes, "seconds": []} for one in methods]
    for count in protocol.inputs:
        taken: list[list[float]] = [[] for _ in methods]
        for turn in range(protocol.rounds * len(methods[0].matrices) + 1):
            for method, seconds in zip(methods, taken, strict=True):
                inputs = torch.ones((count, cols), dtype=method.dtype)
                matrix = method.matrices[turn % len(method.matrices)]
                started = clock()
                method.product(inputs, matrix)
                seconds.append(clock() - started)
        for one, seconds in zip(found, taken, strict=True):
            one["seconds"].append(median(seconds[1:]))
    return found


def _clock(threads: int) -> Callable[[], float]:
    """CPU time for one thread, which other work on the machine disturbs less; wall time for several."""
    return time.process_time if threads == 1 else time.perf_counter


def _methods(rows: int, cols: int, cold_bytes: int) -> list[Method]:
    """Our products by bits, the torch reference, and dense products in torch."""
    packed = {nbits: _packed(rows, cols, nbits) for nbits in NBITS}
    dense = {dtype: torch.ones((rows, cols), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    together = sum(matrix.packing.nbytes for matrix in packed.values()) + sum(m.nbytes for m in dense.values())
    copies = max(1, cold_bytes // together)
    taken = {nbits: [matrix, *(_copied(matrix) for _ in range(copies - 1))] for nbits, matrix in packed.items()}
    methods = [
        Method(f"{nbits}-bit{suffix}", product, taken[nbits], packed[nbits].packing.nbytes, torch.float32)
        for suffix, product in (("", kernels.linear), (", int8 input", partial(kernels.linear, activations="int8")))
        for nbits in NBITS
    ]
    methods.append(Method("4-bit, in torch", reference.linear, taken[4], packed[4].packing.nbytes, torch.float32))
    return methods + [
        Method(
            f"dense {str(dtype).removeprefix('torch.')}",
            functional.linear,
            [matrix, *(matrix.clone() for _ in range(copies - 1))],
            matrix.nbytes,
            dtype,
        )
        for dtype, matrix in dense.items()
    ]


def _packed(rows: int, cols: int, nbits: int) -> PackedMatrix:
    """A matrix of random codes, with scales and zeros that keep its products finite."""
    packing = Packing(rows, cols, nbits, GROUP_SIZE, META_NBITS)
    made = {}
    for part in packing.parts:
        if part.dtype == "uint8":
            made[part.name] = torch.randint(0, 256, part.shape, dtype=torch.uint8)
        else:
            made[part.name] = torch.full(part.shape, 1e-4, dtype=torch.float16)
    return PackedMatrix(packing, made)


def _copied(matrix: PackedMatrix) -> PackedMatrix:
    return PackedMatrix(matrix.packing, {name: part.clone() for name, part in matrix.parts.items()})


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
