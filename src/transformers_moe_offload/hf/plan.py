"""Plan how many slots each device gets, show the plan, and build the caches it describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.cache.capacity import PoolNeed, share_out, smallest_budget
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.memory.available import available_bytes
from transformers_moe_offload.memory.checkpoint import ExpertStore
from transformers_moe_offload.memory.record import RecordLayout
from transformers_moe_offload.memory.slots import SlotPool
from transformers_moe_offload.memory.transfer import Copier, CudaCopier, HostCopier, default_workers
from transformers_moe_offload.policies import make_policy


@dataclass(frozen=True)
class Placement:
    """One sparse layer and the device it computes on."""

    spec: ExpertSpec
    device: torch.device


@dataclass(frozen=True)
class PoolPlan:
    """One pool of slots: the layers that share it and its size."""

    device: torch.device
    layers: tuple[int, ...]
    need: PoolNeed
    num_slots: int

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pool's slots."""
        return self.num_slots * self.need.slot_bytes


@dataclass(frozen=True)
class OffloadPlan:
    """Where a model's experts are, and how much of them fits into the cache."""

    pools: tuple[PoolPlan, ...]
    budget_bytes: int
    smallest_budget: int

    @property
    def num_experts(self) -> int:
        """Experts of all sparse layers."""
        return sum(pool.need.num_experts for pool in self.pools)

    @property
    def num_slots(self) -> int:
        """Experts that can be resident at once."""
        return sum(pool.num_slots for pool in self.pools)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts' records."""
        return sum(pool.need.all_bytes for pool in self.pools)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(pool.cache_bytes for pool in self.pools)

    def __str__(self) -> str:
        header = ("device", "sparse layers", "experts", "bytes per expert", "all experts", "slots", "cache")
        rows = [
            (
                str(pool.device),
                str(pool.need.num_layers),
                str(pool.need.num_experts),
                readable(pool.need.slot_bytes),
                readable(pool.need.all_bytes),
                f"{pool.num_slots} ({pool.num_slots / pool.need.num_experts:.0%})",
                readable(pool.cache_bytes),
            )
            for pool in self.pools
        ]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)
        ]
        lines.append(
            f"cache budget {readable(self.budget_bytes)}, smallest that works {readable(self.smallest_budget)} "
            f"({self.smallest_budget:,} bytes); experts beyond the cache stay on disk"
        )
        return "\n".join(lines)


def readable(nbytes: float) -> str:
    """A number of bytes for people: `6.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def make_plan(placements: Sequence[Placement], config: OffloadConfig) -> OffloadPlan:
    """Share the budget out; raises `CapacityError` if it is too small."""
    groups: dict[tuple[torch.device, int], list[ExpertSpec]] = {}
    for placement in placements:
        slot_bytes = RecordLayout(placement.spec.fields).nbytes
        groups.setdefault((placement.device, slot_bytes), []).append(placement.spec)
    needs = [
        PoolNeed(len(specs), sum(spec.num_experts for spec in specs), slot_bytes)
        for (_, slot_bytes), specs in groups.items()
    ]
    all_bytes = sum(need.all_bytes for need in needs)
    budget = config.budget
    available = 0
    if budget.nbytes is None and budget.share is None:
        available = sum(available_bytes(device) for device in {device for device, _ in groups})
    budget_bytes = budget.resolve(all_bytes, available)
    pools = [
        PoolPlan(device, tuple(spec.layer for spec in specs), need, num_slots)
        for ((device, _), specs), need, num_slots in zip(
            groups.items(), needs, share_out(budget_bytes, needs), strict=True
        )
    ]
    return OffloadPlan(tuple(pools), budget_bytes, smallest_budget(needs))


def build_caches(plan: OffloadPlan, store: ExpertStore, config: OffloadConfig) -> dict[int, ExpertCache]:
    """One cache for each pool of the plan: layer -> the cache it uses."""
    caches: dict[int, ExpertCache] = {}
    for pool in plan.pools:
        # Slots outlive any inference-mode block that happens to be open while they are made.
        with torch.inference_mode(False):
            slots = SlotPool(pool.num_slots, pool.need.slot_bytes, pool.device)
        copier = _copier(store, pool, config)
        cache = ExpertCache(store, pool.layers, slots, make_policy(config.policy), copier)
        caches |= dict.fromkeys(pool.layers, cache)
    return caches


def _copier(store: ExpertStore, pool: PoolPlan, config: OffloadConfig) -> Copier:
    workers = config.io_workers or default_workers()
    if pool.device.type == "cuda":
        return CudaCopier(store.read_into, workers, pool.device, pool.need.slot_bytes, config.pin_memory is not False)
    return HostCopier(store.read_into, workers)
