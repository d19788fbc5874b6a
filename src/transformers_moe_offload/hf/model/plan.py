"""Plan how many slots each device gets, and print the plan. `hf/model/pools.py` builds the caches that it describes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from transformers_moe_offload.cache.capacity import PoolNeed, share_out, share_out_by_device, smallest_budget
from transformers_moe_offload.config import Budget, OffloadConfig
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.formats.by_expert import AS_USED, LayerCodecs
from transformers_moe_offload.hf.model.room import room_for_slots
from transformers_moe_offload.notebook import html_paragraph, html_table
from transformers_moe_offload.store.direct_io_probe import is_faster_past_cache
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.system.free_memory import available_bytes, page_cache_holds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """One sparse layer and the device it computes on."""

    spec: ExpertSpec
    device: torch.device
    codecs: LayerCodecs = AS_USED
    """How its experts are quantized, if they are."""
    is_mappable: bool = False
    """Whether its experts can be used in place in the mapped files of the checkpoint."""
    is_in_ram: bool = False
    """Whether its experts are in our own memory instead of files."""
    is_addressed: bool = False
    """Whether its experts should be read by address if all of them fit into page-locked memory."""
    spare_bytes: int | None = None
    """Bytes of whole pages beyond the expert in them; None if experts cannot be used inside whole pages of a file."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert's record, not counting hot experts, whose records may differ."""
        return self.record_bytes[0]

    @property
    def record_bytes(self) -> list[int]:
        """Bytes of an expert's record for each codec of the layer."""
        return [RecordLayout(self.spec.fields if c is None else c.stored).nbytes for c in self.codecs.kinds]


@dataclass(frozen=True)
class PoolPlan:
    """One pool of slots: the layers that share it and its size."""

    device: torch.device
    layers: tuple[int, ...]
    need: PoolNeed
    num_slots: int
    is_mapped: bool = False
    """Whether slots are mapped pages of the files instead of buffers."""
    arena_bytes: int = 0
    """Page-locked RAM for all experts of the pool, which the device can read; 0 if it does not decode on the device."""
    is_in_ram: bool = False
    """Whether the experts are in our own memory instead of files: it is page-locked in place, and the host tier holds
    no copies."""
    spare_bytes: int | None = None
    """Bytes of every slot beyond the expert's own, if whole pages of files are read past the page cache into slots;
    else None."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pool's slots, at most."""
        return self.need.bytes_of(self.num_slots)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different sizes of experts in bytes, ascending."""
        return tuple(sorted({self.need.slot_bytes, *(size for size, _ in self.need.others)}))


@dataclass(frozen=True, repr=False)
class OffloadPlan:
    """Where a model's experts are stored, and how many fit into the cache. Notebooks show it as a table."""

    pools: tuple[PoolPlan, ...]
    budget_bytes: int
    smallest_budget: int
    host_bytes: int = 0
    """RAM for experts on their way to accelerators."""
    reads_past_cache: bool = False
    """Whether files are read past the page cache (direct I/O)."""
    arena_refused: str | None = None
    """Why there is no arena although experts could be read by address; None if there is one or none was planned."""

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
    def arena_bytes(self) -> int:
        """Page-locked RAM for experts that the devices read by address."""
        return sum(pool.arena_bytes for pool in self.pools)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(pool.cache_bytes for pool in self.pools)

    def __repr__(self) -> str:
        layers = sum(pool.need.num_layers for pool in self.pools)
        return (
            f"OffloadPlan({self.num_slots} slots for the {self.num_experts} experts of {layers} sparse layers, "
            f"{readable(self.cache_bytes)} of {readable(self.expert_bytes)})"
        )

    def _repr_html_(self) -> str:
        header, *rows = self._table()
        return html_table(header, rows) + html_paragraph(self._budgets())

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join([*lines, self._budgets()])

    def _table(self) -> list[list[str]]:
        """The header, then a row for each pool."""
        header = ["tier", "sparse layers", "experts", "bytes per expert", "all experts", "slots", "cache"]
        rows = [
            [
                f"{pool.device} (mapped)" if pool.is_mapped else str(pool.device),
                str(pool.need.num_layers),
                str(pool.need.num_experts),
                " to ".join(map(readable, pool.sizes)),
                readable(pool.need.all_bytes),
                f"{pool.num_slots} ({pool.num_slots / pool.need.num_experts:.0%})",
                readable(pool.cache_bytes),
            ]
            for pool in self.pools
        ]
        if self.arena_bytes:
            header.append("page-locked")
            for row, pool in zip(rows, self.pools, strict=True):
                row.append(readable(pool.arena_bytes) if pool.arena_bytes else "-")
        return [header, *rows]

    def _budgets(self) -> str:
        return (
            f"cache budget {readable(self.budget_bytes)}, smallest that works {readable(self.smallest_budget)} "
            f"({self.smallest_budget:,} bytes); {self._beyond_the_cache()}"
        )

    def _beyond_the_cache(self) -> str:
        on_disk = "stay on disk, read past the page cache" if self.reads_past_cache else "stay on disk"
        if all(pool.arena_bytes for pool in self.pools):
            return "experts beyond the cache are read in page-locked RAM"
        num_in_ram = sum(pool.need.num_experts for pool in self.pools if pool.is_in_ram)
        if num_in_ram == self.num_experts:
            return "experts beyond the cache are in RAM"
        if num_in_ram:
            tier = f", {readable(self.host_bytes)} of it hold others" if self.host_bytes else ""
            return f"beyond the cache {num_in_ram} experts are in RAM{tier}, the others {on_disk}"
        if not self.host_bytes:
            return f"experts beyond the cache {on_disk}"
        return f"beyond the cache {readable(self.host_bytes)} of RAM hold experts, the others {on_disk}"


def readable(nbytes: float) -> str:
    """A number of bytes with a unit: `6.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


_Groups = dict[tuple[torch.device, int, bool, bool], list[Placement]]
"""The layers of each pool, which share a device, a record size, whether they are mappable, and RAM or disk."""


def make_plan(
    placements: Sequence[Placement], config: OffloadConfig, held: Mapping[torch.device, int] | None = None
) -> OffloadPlan:
    """Distribute the budget over pools; `held` are the bytes that existing caches already have on each device.

    Raises `CapacityError` if the budget is too small, `ConfigError` if `mmap=True` is not possible.
    """
    groups = _grouped(placements, config)
    needs, spares, has_room, past_cache = _needs(groups, config)
    budget_bytes, slots = _shared_out(config.budget, [device for device, *_ in groups], needs, held or {})
    pools = [
        PoolPlan(
            device,
            tuple(member.spec.layer for member in members),
            need,
            num_slots,
            # Not mapped if the cache holds all experts: each is read once, and in a slot it begins at a cache line,
            # which made decoding 1.07 times as fast as at its offset in a file.
            is_mapped=is_mappable and (config.mmap is True or is_in_ram or (has_room and num_slots < need.num_experts)),
            is_in_ram=is_in_ram,
            spare_bytes=spare,
        )
        for ((device, _, is_mappable, is_in_ram), members), need, num_slots, spare in zip(
            groups.items(), needs, slots, spares, strict=True
        )
    ]
    addressed = {placement.spec.layer for placement in placements if placement.is_addressed}
    placed, refused = _with_arenas(pools, addressed, config)
    return OffloadPlan(
        tuple(placed),
        budget_bytes,
        smallest_budget(needs),
        host_bytes=_host_bytes(placed, config),
        reads_past_cache=past_cache,
        arena_refused=refused,
    )


def expect_enough(placements: Sequence[Placement], config: OffloadConfig) -> None:
    """Raise as `make_plan` would for a budget in bytes or a share. An "auto" budget is not known before loading."""
    if not _is_automatic(config.budget):
        groups = _grouped(placements, config)
        _shared_out(config.budget, [device for device, *_ in groups], _needs(groups, config).of_pools, {})


def _is_automatic(budget: Budget) -> bool:
    return budget.nbytes is None and budget.share is None


def _grouped(placements: Sequence[Placement], config: OffloadConfig) -> _Groups:
    groups: _Groups = {}
    for placement in placements:
        kind = (placement.device, placement.slot_bytes, _is_mappable(placement, config), placement.is_in_ram)
        groups.setdefault(kind, []).append(placement)
    return groups


class _Needs(NamedTuple):
    of_pools: list[PoolNeed]
    spares: list[int | None]
    """`PoolPlan.spare_bytes` of each pool."""
    has_room: bool
    """Whether the page cache can hold all experts."""
    past_cache: bool
    """Whether to read past the page cache."""


def _needs(groups: _Groups, config: OffloadConfig) -> _Needs:
    has_room = page_cache_holds(sum(_need(members, 0).all_bytes for members in groups.values()))
    past_cache = config.direct_io is True or (config.direct_io == "auto" and not has_room)
    into_pages = past_cache and config.mmap is not True
    spares = [_spare_bytes(members) if into_pages else None for members in groups.values()]
    needs = [_need(members, spare or 0) for members, spare in zip(groups.values(), spares, strict=True)]
    return _Needs(needs, spares, has_room, past_cache)


def _shared_out(
    budget: Budget, devices: Sequence[torch.device], needs: Sequence[PoolNeed], held: Mapping[torch.device, int]
) -> tuple[int, list[int]]:
    """The budget in bytes, and the slots of each pool: in proportion, or, if automatic, by free memory per device."""
    if _is_automatic(budget):
        return share_out_by_device(room_for_slots(devices, needs, held), devices, needs)
    budget_bytes = budget.resolve(sum(need.all_bytes for need in needs), 0)
    return budget_bytes, share_out(budget_bytes, needs)


def _with_arenas(
    pools: Sequence[PoolPlan], addressed: Set[int], config: OffloadConfig
) -> tuple[Sequence[PoolPlan], str | None]:
    """The pools, with arenas for those with layers that read by address; or unchanged, with the reason."""
    wanted = [pool for pool in pools if not addressed.isdisjoint(pool.layers)]
    needed = sum(pool.need.all_bytes for pool in wanted)
    if not needed:
        return pools, None
    allowed = _host_budget(wanted, config)
    if allowed < needed:
        return pools, (
            f"all experts take {needed:,} bytes of page-locked memory, and host_budget={config.host_budget!r} allows "
            f"{allowed:,}; set OffloadConfig.host_budget to {needed:,} bytes or more"
        )
    return [
        replace(pool, is_mapped=False, arena_bytes=pool.need.all_bytes) if pool in wanted else pool for pool in pools
    ], None


def without_arenas(plan: OffloadPlan, config: OffloadConfig, refused: str) -> OffloadPlan:
    """The plan without arenas, which were `refused` for this reason."""
    pools = tuple(replace(pool, arena_bytes=0) for pool in plan.pools)
    return replace(plan, pools=pools, host_bytes=_host_bytes(pools, config), arena_refused=refused)


def _spare_bytes(members: Sequence[Placement]) -> int | None:
    """The largest `spare_bytes` of some layers; None if one layer's experts cannot be used inside whole pages."""
    known = [member.spare_bytes for member in members if member.spare_bytes is not None]
    return max(known) if len(known) == len(members) else None


def _need(members: Sequence[Placement], spare_bytes: int) -> PoolNeed:
    """The need of a pool of these layers, with `spare_bytes` more in every slot."""
    hot: Counter[int] = Counter()
    for member in members:
        for size in member.record_bytes[1:]:
            hot[size + spare_bytes] += len(member.codecs.hot_experts)
    num_experts = sum(member.spec.num_experts for member in members)
    return PoolNeed(len(members), num_experts, members[0].slot_bytes + spare_bytes, tuple(hot.items()))


def _host_bytes(pools: Sequence[PoolPlan], config: OffloadConfig) -> int:
    """RAM of the host tier, for experts on disk of pools on accelerators without an arena."""
    if all(pool.is_in_ram for pool in pools):
        return 0
    on_disk = [pool for pool in pools if pool.device.type != "cpu" and not pool.arena_bytes and not pool.is_in_ram]
    behind = sum(pool.need.all_bytes for pool in on_disk)
    if any(pool.arena_bytes for pool in pools):
        return min(behind, max(0, _host_budget(pools, config) - sum(pool.arena_bytes for pool in pools)))
    if behind:
        return _host_budget(on_disk, config)
    if config.host_budget != "auto":
        logger.warning(
            f"host_budget={config.host_budget!r} has no effect: every cache of experts is in RAM already, and "
            f"cache_budget={config.cache_budget!r} is its size"
        )
    return 0


def _host_budget(pools: Sequence[PoolPlan], config: OffloadConfig) -> int:
    """The host budget in bytes, for all experts of some pools. Experts that are in RAM already count towards it, but
    take no free RAM: "auto" is half of the free RAM, plus their bytes."""
    in_ram = sum(pool.need.all_bytes for pool in pools if pool.is_in_ram)
    return Budget.parse(config.host_budget, "host_budget").resolve(
        sum(pool.need.all_bytes for pool in pools), available_bytes(torch.device("cpu")) + in_ram
    )


def _is_mappable(placement: Placement, config: OffloadConfig) -> bool:
    if config.mmap is True and not placement.is_mappable:
        raise ConfigError(
            f"mmap=True, but the experts of {placement.spec.name} cannot be used where they lie in the files (they are "
            f"stored in another dtype, layout or order of parts than the model uses, or in more files than a process "
            f"may keep open, or computed on an accelerator); leave mmap at 'auto'"
        )
    return placement.is_mappable


def tried_out(plan: OffloadPlan, sources: Sequence[LayerSource], config: OffloadConfig) -> OffloadPlan:
    """The plan, with direct I/O only if a measurement shows it to be faster; `direct_io` other than "auto" is kept."""
    if config.direct_io != "auto" or not plan.reads_past_cache:
        return plan
    on_disk = [source for source in sources if not source.is_in_ram]
    return replace(plan, reads_past_cache=bool(on_disk) and is_faster_past_cache(ExpertStore(on_disk)))
