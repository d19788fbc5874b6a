"""The rows of the ablation: ways of offloading that others have, and ours built up step by step, in one framework.

After table 2 of arXiv 2312.17238, whose rows are: everything, without prefetch, without the cache, and accelerate. Each
variant changes where a model's experts are kept and how they move; the arithmetic is the same for all, and so are the
logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import transformers_moe_offload
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.layers import experts_of, sparse_layers
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.slots.base import Slots
from transformers_moe_offload.slots.buffers import CopiedSlots
from transformers_moe_offload.slots.transfer import Transfer

STATES = ("warm", "cold")
"""Of the page cache."""


@dataclass(frozen=True)
class Variant:
    """A row of the ablation."""

    name: str
    says: str
    """What it does, for the report."""
    config: Callable[[str | int], OffloadConfig]
    """From the budget."""
    apply: Callable[[Any], None] = lambda model: None
    """What is done to the model after it has been loaded."""
    states: tuple[str, ...] = STATES
    """Of the page cache, in which it is what the package would do."""


def _copied(budget: str | int) -> OffloadConfig:
    return OffloadConfig(cache_budget=budget, mmap=False, prefetch=None, misses="fetch")


def _keep_nothing(model: Any) -> None:
    """So few slots that every layer flushes what the others had; the most of which no layer can keep its floor."""
    runtime = model.moe_offload
    plan = runtime.plan
    num_slots = max(1, min(pool.need.num_layers for pool in plan.pools) - 1)
    runtime.resize(num_slots * sum(pool.need.slot_bytes for pool in plan.pools))


def _read_whole_layers(model: Any) -> None:
    """Bring all experts of a layer in at each visit, the unwanted ones before the wanted."""
    _keep_nothing(model)
    for module, layer in sparse_layers(model):

        def visit_the_others(module: nn.Module, args: Any, kwargs: Any, layer: SparseLayer = layer) -> None:
            wanted = set((*args, *kwargs.values())[1].unique().tolist())
            cache = experts_of(module).cache
            others = [expert for expert in range(cache.num_experts(layer.index)) if expert not in wanted]
            with cache.turn, cache.visit(layer.index, others) as visit:
                for _ in visit:
                    pass

        module.register_forward_pre_hook(visit_the_others, with_kwargs=True)


def _imitate_published(model: Any) -> None:
    caches = [experts_of(module).cache for module, _ in sparse_layers(model)]
    for cache in {id(cache): cache for cache in caches}.values():
        assert isinstance(cache.slots, CopiedSlots)
        cache.slots = PublishedSlots(cache.slots)


class PublishedSlots:
    """Slots that move experts as the code published with arXiv 2312.17238 does.

    Its cache (`expert_cache.py`) swaps: an evicted expert is written back to the memory that it was read from, although
    nothing has changed it. One swap follows another, and the layer computes when the last is done. Its quota of slots
    for each layer is what our floor comes to when the budget divides evenly among the layers.
    """

    def __init__(self, inner: CopiedSlots) -> None:
        self._inner = inner
        self._occupied: set[int] = set()
        self._written_back = torch.empty(inner.pool.slot_bytes, dtype=torch.uint8)
        self.read_bytes = 0
        self.written_bytes = 0

    def remove(self, slot: int) -> None:
        """Free a buffer."""
        self._occupied.discard(slot)
        self._inner.remove(slot)

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> Transfer:
        """Write back who is there, bring the expert in, and wait for both."""
        if slot in self._occupied:
            record = self._inner.pool.record(slot)
            self._written_back.copy_(record)  # sync: device -> host
            self.written_bytes += record.nbytes
        self._occupied.add(slot)
        transfer = _Finished(self._inner.start(expert, slot, alongside))
        self.read_bytes += transfer.finish()
        return transfer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # everything else is as it was


class _Finished:
    """A transfer that has been waited for."""

    def __init__(self, inner: Transfer) -> None:
        self._inner = inner
        self._from_files = inner.finish()

    def is_done(self) -> bool:
        return True

    def finish(self) -> int:
        return self._from_files

    def cancel(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def written_share(model: Any) -> float:
    """Bytes written back for each byte read, since the model was loaded."""
    slots: set[Slots] = {experts_of(module).cache.slots for module, _ in sparse_layers(model)}
    published = [one for one in slots if isinstance(one, PublishedSlots)]
    read_bytes = sum(one.read_bytes for one in published)
    return sum(one.written_bytes for one in published) / read_bytes if read_bytes else 0.0


def prefetching() -> dict[str, Any] | None:
    """The option that switches prefetch on; None as long as there is none."""
    config = getattr(transformers_moe_offload, "PrefetchConfig", None)
    return None if config is None else {"prefetch": config()}


def variants() -> list[Variant]:
    """All rows that this version can do, slowest first."""
    rows = [
        Variant("whole layers", "all experts of a layer are read at each visit", _copied, _read_whole_layers),
        Variant("no cache", "wanted experts are read, none is kept", _copied, _keep_nothing),
        Variant(
            "as published",
            "LRU with a quota for each layer, write-back on eviction, computing waits for every load",
            _copied,
            _imitate_published,
        ),
        Variant("lru", "LRU, loads overlap with computing", _copied),
    ]
    ahead = prefetching()
    if ahead is not None:

        def copied_ahead(budget: str | int) -> OffloadConfig:
            return OffloadConfig(cache_budget=budget, mmap=False, misses="fetch", **ahead)

        published_ahead = "what the paper adds to that, and its code does not have: loads for the next layer"
        rows += [
            Variant("as published, ahead", published_ahead, copied_ahead, _imitate_published),
            Variant("lru + prefetch", "LRU, and loads ahead of demand", copied_ahead),
        ]
    rows += [
        Variant(
            "everything, RAM to spare",
            "this package as it is by default where the page cache holds all experts, with prefetch",
            lambda budget: OffloadConfig(cache_budget=budget, mmap="auto", **(ahead or {})),
            states=("warm",),
        ),
        Variant(
            "everything, RAM short",
            "as it is by default where that is not so and the disk is faster past the page cache, with prefetch",
            lambda budget: OffloadConfig(cache_budget=budget, mmap=False, direct_io=True, **(ahead or {})),
            states=("cold",),
        ),
    ]
    return rows
