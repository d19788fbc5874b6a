"""Plan how many slots each device gets, and what else takes memory beside them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple

import torch

from transformers_moe_offload.cache.capacity import PoolNeed, share_out, share_out_by_device, smallest_budget
from transformers_moe_offload.config import Budget, OffloadConfig
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.hf.model.placements import Placement, placements_of
from transformers_moe_offload.hf.model.plan import OffloadPlan, PoolPlan
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.slots.buffers import allocated_bytes
from transformers_moe_offload.store.direct_io_probe import is_faster_past_cache
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.system.free_memory import available_bytes, page_cache_holds

logger = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What the layers of one pool have in common."""

    device: torch.device
    slot_bytes: int
    is_mappable: bool
    is_in_ram: bool


_Groups = dict[_Kind, list[Placement]]
"""The layers of each pool."""


def _room_for_slots(
    devices: Sequence[torch.device], needs: Sequence[PoolNeed], held: Mapping[torch.device, int]
) -> dict[torch.device, int]:
    """Bytes of slots that fit on each device; `devices[i]` is the device of the pool with `needs[i]`.

    `held` are bytes of existing caches that will be resized. Bytes lost to alignment between slots are not counted.
    """
    shares: dict[torch.device, float] = {}
    for device, need in zip(devices, needs, strict=True):
        sizes = (need.slot_bytes, *(size for size, _ in need.others))
        shares[device] = min([shares.get(device, 1.0), *(n / allocated_bytes(n, device) for n in sizes)])
    return {device: int(share * available_bytes(device, held.get(device, 0))) for device, share in shares.items()}


def make_plan(
    placements: Sequence[Placement], config: OffloadConfig, held: Mapping[torch.device, int] | None = None
) -> OffloadPlan:
    """Distribute the budget over pools; `held` are the bytes that existing caches already have on each device.

    Raises `CapacityError` if the budget is too small, `ConfigError` if `mmap=True` is not possible.
    """
    groups = _grouped(placements, config)
    needs, spares, has_room, past_cache = _needs(groups, config)
    budget_bytes, slots = _shared_out(config.budget, groups, needs, held or {})
    pools = [
        PoolPlan(
            kind.device,
            tuple(member.spec.layer for member in members),
            need,
            num_slots,
            # Not mapped if the cache holds all experts: each is read once, and in a slot it begins at a cache line,
            # which made decoding 1.07 times as fast as at its offset in a file.
            is_mapped=kind.is_mappable
            and (config.mmap is True or kind.is_in_ram or (has_room and num_slots < need.num_experts)),
            is_in_ram=kind.is_in_ram,
            spare_bytes=spare,
        )
        for (kind, members), need, num_slots, spare in zip(groups.items(), needs, slots, spares, strict=True)
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


def expect_enough(
    layers: Sequence[SparseLayer],
    sources: Mapping[int, LayerSource],
    config: OffloadConfig,
    coded: Mapping[int, LayerCodecs],
) -> None:
    """Raise as `make_plan` would for a budget that is too small, before anything is built or encoded.

    `coded` are the codecs of layers whose experts will be in RAM. An automatic budget is not known before loading.
    """
    if _is_automatic(config.budget):
        return
    found = [
        replace(one, codecs=coded[layer], is_in_ram=True, is_mappable=one.device.type == "cpu", spare_bytes=None)
        if (layer := one.spec.layer) in coded
        else one
        for one in placements_of(layers, sources, config)
    ]
    groups = _grouped(found, config)
    _shared_out(config.budget, groups, _needs(groups, config).of_pools, {})


def _is_automatic(budget: Budget) -> bool:
    return budget.nbytes is None and budget.share is None


def _grouped(placements: Sequence[Placement], config: OffloadConfig) -> _Groups:
    groups: _Groups = {}
    for placement in placements:
        kind = _Kind(placement.device, placement.slot_bytes, _is_mappable(placement, config), placement.is_in_ram)
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
    budget: Budget, kinds: Iterable[_Kind], needs: Sequence[PoolNeed], held: Mapping[torch.device, int]
) -> tuple[int, list[int]]:
    """The budget in bytes, and the slots of each pool: in proportion, or, if automatic, by free memory per device."""
    if _is_automatic(budget):
        devices = [kind.device for kind in kinds]
        return share_out_by_device(_room_for_slots(devices, needs, held), devices, needs)
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
