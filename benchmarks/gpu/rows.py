"""The rows of `gpu.py`: ways of decoding a model whose experts do not fit into a GPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FITS = "100%"
PARTLY = "40%"
"""Of the experts: the residency that is held against a resident model."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of decoding."""

    name: str
    says: str
    """What it does, for the report."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `OffloadConfig`, beside the budget."""
    variant: str | None = None
    """The row of the ablation that it is, if it is one: see `variants.py`."""
    budget: str | None = None
    """Of the cache, where it is not what the cap on GPU memory leaves; then there is no cap either."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of `generate`."""
    is_compiled: bool = False
    """Whether `torch.compile` makes kernels of the dense part, which round otherwise."""
    num_gpus: int = 1
    """That its layers are spread over."""
    by_accelerate: bool = False

    @property
    def is_on_device(self) -> bool:
        """Whether its experts are read by address."""
        return self.options.get("decode") in ("device", "graph")

    @property
    def is_exact(self) -> bool:
        """Whether it has to give the same logits as all other such rows, bit for bit."""
        return self.is_on_device and not self.is_compiled


_HOST = {"decode": "host", "misses": "fetch"}
_DEVICE = {"decode": "device", "misses": "fetch"}
_GRAPH = {"decode": "graph", "misses": "fetch"}
_STATIC = {"cache_implementation": "static"}

RESIDENT, RESIDENT_GRAPHED = "resident, eager", "resident, graphed"
ACCELERATE = "accelerate"
PUBLISHED_FULL = "as published, ahead"
HOST, COMPUTE, EAGER, GRAPHED = "host", "host computes", "eager", "graphed"
COMPILED, SPREAD = f"{GRAPHED}, compiled", f"{EAGER}, two GPUs"
EAGER_PARTLY, GRAPHED_PARTLY = f"{EAGER}, {PARTLY}", f"{GRAPHED}, {PARTLY}"

NAIVE = "whole layers"
ABLATION = (NAIVE, "no cache", "as published", PUBLISHED_FULL, "lru", "lru + prefetch")

ROWS = (
    Row(name=RESIDENT, says="all experts in GPU memory", options=_DEVICE, budget=FITS),
    Row(
        name=RESIDENT_GRAPHED,
        says="the same, whole steps in CUDA graphs",
        options=_GRAPH,
        budget=FITS,
        generation=_STATIC,
    ),
    Row(
        name=ACCELERATE,
        says="accelerate's cpu_offload of the experts modules, bfloat16, with as many layers as fit into RAM; the time "
        "of a token is multiplied up to all layers",
        by_accelerate=True,
    ),
    *(Row(name=name, says="of the ablation", options=_HOST, variant=name) for name in ABLATION),
    Row(name=HOST, says="decoded from the host, which fetches misses", options=_HOST | {"prefetch": {}}),
    Row(
        name=COMPUTE,
        says="the same, but the host computes misses where that is faster",
        options=_HOST | {"misses": "compute"},
    ),
    Row(name=EAGER, says="decoded on the device, misses read in place", options=_DEVICE),
    Row(name=GRAPHED, says="the same, whole steps in CUDA graphs", options=_GRAPH, generation=_STATIC),
    Row(
        name=COMPILED,
        says="the same, the dense part compiled by torch.compile before",
        options=_GRAPH,
        generation=_STATIC,
        is_compiled=True,
    ),
    Row(name=SPREAD, says=f"{EAGER}, with half of the layers on each of two GPUs", options=_DEVICE, num_gpus=2),
    Row(name=EAGER_PARTLY, says=f"{EAGER}, slots for {PARTLY} of the experts", options=_DEVICE, budget=PARTLY),
    Row(
        name=GRAPHED_PARTLY,
        says=f"{GRAPHED}, slots for {PARTLY} of the experts",
        options=_GRAPH,
        budget=PARTLY,
        generation=_STATIC,
    ),
)
BY_NAME = {row.name: row for row in ROWS}

QUICK = (RESIDENT, ACCELERATE, NAIVE, PUBLISHED_FULL, HOST, EAGER, GRAPHED, COMPILED)
"""One row of every kind."""
