"""What is resident, and every step that changes it; no other code changes it.

The residents after a visit do not depend on the order in which loads land: victims are chosen when the visit begins,
and the policy is told of all the experts of a visit at its end, in the order in which they were asked for. If experts
pass in waves, the policy is told of each wave before the next one; the order of use is fixed there.

Ctrl-C can interrupt the main thread between any two lines. So methods that change what is resident record when they
begin and end, and the next visit repairs what an interrupt left: residents stay, loads in flight are given up, and a
new policy is told of the residents.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from transformers_moe_offload.cache.bandwidth import Link
from transformers_moe_offload.cache.capacity import layer_floor
from transformers_moe_offload.cache.change import NotStartedError, change
from transformers_moe_offload.cache.planner import Load, plan
from transformers_moe_offload.cache.residency import Residency
from transformers_moe_offload.cache.table import MOST_NOTED, Tables
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import EvictionPolicy
from transformers_moe_offload.slots.base import Slots
from transformers_moe_offload.slots.transfer import Transfer
from transformers_moe_offload.stats import LayerStats
from transformers_moe_offload.store.layer_source import Weights
from transformers_moe_offload.system.forks import FORKS, Rank

logger = logging.getLogger(__name__)


class CacheSteps:
    """The resident experts of some sparse layers on one device, and what happens to them within a turn.

    Its methods are called with the turn held, by `Visit`, `ExpertCache` and what follows a device.
    """

    def __init__(
        self,
        slots: Slots,
        num_slots: int,
        num_experts: Mapping[int, int],
        policy: EvictionPolicy,
        new_policy: Callable[[], EvictionPolicy] | None = None,
    ) -> None:
        """`num_experts` of each sparse layer that the cache serves, by the layer's index.

        `new_policy` makes a policy that takes over after an interrupt; by default another one of the same class.
        """
        self.slots = slots
        self.residency = Residency(num_slots)
        self.link = Link(slots.num_lanes)
        self.tables = Tables(slots, num_experts)
        self._stats = {layer: LayerStats() for layer in num_experts}
        self.on_visit: Callable[[int, Sequence[int]], None] | None = None
        """Called at the beginning of each visit with the layer and the experts it wants."""
        self._num_experts = dict(num_experts)
        self._num_all = sum(num_experts.values())
        self._ids = {layer: [ExpertId(layer, expert) for expert in range(num)] for layer, num in num_experts.items()}
        """Made once: a visit needs them at every step."""
        self._policy = policy
        self._new_policy = new_policy or type(policy)
        self._in_flight: dict[ExpertId, Transfer] = {}
        self._unannounced: set[ExpertId] = set()
        """Residents that the policy has not been told of yet, because the visit that loaded them is still open."""
        self._ahead: set[ExpertId] = set()
        """Experts loaded ahead of demand, in flight or resident, that no visit has asked for yet."""
        self._asked: frozenset[ExpertId] = frozenset()
        """The experts that the latest visit wants."""
        self.turn = FORKS.with_lock(threading.RLock(), Rank.TURN)
        """Held during a visit."""
        self.is_whole = True
        """False while a change is going on, and after one was interrupted in the middle."""
        for slot in range(num_slots):
            slots.add(slot)

    @property
    def stats(self) -> dict[int, LayerStats]:
        """What was counted so far, by layer."""
        if self.tables.noted:
            with self.turn:
                self.catch_up()
        return self._stats

    def num_experts(self, layer: int) -> int:
        """Experts of a sparse layer."""
        return self._num_experts[layer]

    @property
    def holds_everything(self) -> bool:
        """Whether every expert of every layer is resident."""
        return len(self.residency.residents) == self._num_all

    def can_use_tables(self, now: float) -> bool:
        """Whether layers may use residents by their tables, at a time of `time.monotonic`: not after an interrupt, nor
        while experts that were loaded ahead are to be counted when they are used, nor if files have changed."""
        are_unchanged = self.slots.are_files_unchanged
        return self.is_whole and not self._ahead and (are_unchanged is None or are_unchanged(now))

    def note(self, layer: int, wanted: Sequence[int]) -> None:
        """A layer has used experts, all of them resident, by its table. `wanted` are in the order of a visit."""
        self.tables.noted.append((layer, wanted))
        if self.on_visit is not None or len(self.tables.noted) == MOST_NOTED:
            self.catch_up()

    def catch_up(self) -> None:
        """Do what visits would have done for the experts that were noted. Call it before any other step."""
        if not self.tables.noted or not self.is_whole:
            return
        was_whole, self.is_whole = self.is_whole, False  # as in `begin`
        noted = self.tables.take_noted()
        for layer, numbers in noted:
            ids = self._ids[layer]
            wanted = [ids[number] for number in numbers]
            self._policy.begin(layer, wanted)
            if self.on_visit is not None:
                self.on_visit(layer, numbers)
            for expert in wanted:
                self._policy.use(expert)
            self._stats[layer].hits += len(wanted)
            self._asked = frozenset(wanted)
        self.link.quiet_visits += len(noted)
        self.is_whole = was_whole

    def holds_all(self, layer: int) -> bool:
        """Whether every expert of a layer is resident or loading."""
        return self.residency.count(layer) == self._num_experts[layer]

    def is_absent(self, expert: ExpertId) -> bool:
        """Whether an expert would have to be loaded."""
        return self.residency.is_absent(expert)

    def with_slots(self, layer: int) -> bytes:
        """A byte for each expert of a layer: 1 if it is resident or loading. Called without the turn: as of now."""
        flags = self.residency.flags.get(layer)
        if flags is None:
            with self.turn:
                flags = self.residency.keep_flags(layer, self._num_experts[layer])
        return bytes(flags)

    @property
    def num_loading(self) -> int:
        """Loads in flight."""
        return len(self._in_flight)

    def repair(self) -> None:
        """Restore a consistent state after an interrupted change. Call it before any other step."""
        if self.is_whole:
            self.catch_up()
            return
        for layer, wanted in self.tables.take_noted():
            self._stats[layer].hits += len(wanted)
        self._asked = frozenset()
        held = self.residency.start_over()
        self.slots.start_over(held)
        self.tables.start_over(held)
        self._in_flight.clear()
        self._unannounced.clear()
        self._ahead.intersection_update(held.values())
        self._policy = self._new_policy()
        for layer in sorted({expert.layer for expert in held.values()}):
            experts = sorted(expert for expert in held.values() if expert.layer == layer)
            self._policy.begin(layer, experts)
            for expert in experts:
                self._policy.admit(expert)
                if expert not in self._ahead:
                    self._policy.use(expert)
        self.is_whole = True

    def begin(self, layer: int, wanted: Sequence[ExpertId], on_host: Container[int]) -> bool:
        """Count the experts that a layer is about to use or has the host compute, and tell the policy of them.

        Returns whether all of them are resident.
        """
        self.catch_up()
        was_whole, self.is_whole = self.is_whole, False  # as `change` does, which would be one more call in every step
        self._asked = frozenset(wanted)
        if self._ahead:
            self._receive_ahead()
        residents = self.residency.residents
        slots = [residents[expert] for expert in wanted if expert in residents]
        lost = () if self.slots.lost is None else self.slots.lost(slots)
        if lost:
            for expert in [expert for expert in wanted if residents.get(expert) in lost]:
                self._evict(expert)
        are_all_resident = len(slots) == len(wanted) and not lost
        if self.slots.lost is not None:
            self.tables.keep(layer, wanted)
        if are_all_resident and not self._ahead:
            self._stats[layer].hits += len(wanted)
            self.link.quiet_visits += 1
        else:
            self._count(layer, wanted, on_host)
        self._policy.begin(layer, wanted)
        if self.on_visit is not None:
            self.on_visit(layer, [expert.expert for expert in wanted])
        self.is_whole = was_whole
        return are_all_resident

    def _count(self, layer: int, wanted: Sequence[ExpertId], on_host: Container[int]) -> None:
        """Count hits and misses of a visit, and give demand the link if some experts have to be loaded."""
        stats = self._stats[layer]
        misses_before, num_on_host = stats.misses, 0
        for expert in wanted:
            if expert in self._ahead:
                self._ahead.remove(expert)
                stats.prefetch_used += 1
            if self.residency.is_resident(expert):
                stats.hits += 1
            elif self.residency.is_loading(expert):
                stats.late_hits += 1
            else:
                stats.misses += 1
                num_on_host += expert.expert in on_host
        stats.computed += num_on_host
        num_loads = stats.misses - misses_before - num_on_host
        if num_loads:
            self._cancel_ahead()
        self.link.asked(num_loads)

    @change
    def start_loads(self, upcoming: Sequence[ExpertId]) -> bool:
        """Start as many loads as there is room for; returns whether some are deferred."""
        planned = plan(upcoming, self.residency, self._policy.candidates(), self._floor)
        alongside = len(self._in_flight) + len(planned.loads) - 1
        for load in planned.loads:
            self._start(load, alongside)
        return bool(planned.deferred)

    def finish_load(self, expert: ExpertId) -> None:
        """Wait until an expert that is loading is resident; if its load fails it is absent again."""
        transfer = self._in_flight[expert]
        stats = self._stats[expert.layer]
        started = time.perf_counter()
        try:
            from_files = transfer.finish()
        except Exception:
            self._fail(expert)
            raise
        finally:  # a wait interrupted by Ctrl-C leaves the load in flight: the slot may still be written to
            stats.stall_ms += (time.perf_counter() - started) * 1e3
        stats.disk_bytes += from_files
        self._land(expert, transfer.seconds)
        stats.device_bytes += self.slots.device_bytes(expert)

    def has_landed(self, expert: ExpertId) -> bool:
        """Whether an expert that is loading could be used without waiting."""
        return self._in_flight[expert].is_done()

    def weights(self, experts: Iterable[ExpertId]) -> dict[int, Weights]:
        """The weights of some residents of one layer, by expert."""
        residents, weights = self.residency.residents, self.slots.weights
        return {expert.expert: weights[residents[expert]] for expert in experts}

    def retire(self, experts: Iterable[ExpertId]) -> None:
        """The work that reads some residents' weights has been submitted."""
        if self.slots.retire is not None:
            residents = self.residency.residents
            self.slots.retire([residents[expert] for expert in experts])

    def announce(self, used: Iterable[ExpertId]) -> None:
        """Tell the policy which experts were used, and which became resident without being used."""
        was_whole, self.is_whole = self.is_whole, False  # as in `begin`
        for expert in used:
            if self._unannounced:
                self._admit(expert)
            self._policy.use(expert)
        for expert in sorted(self._unannounced):
            self._admit(expert)
        self.is_whole = was_whole

    @change
    def start(self, load: Load) -> None:
        """Start one load of a plan; if it cannot be started, its expert is absent and the slot free."""
        self._start(load, len(self._in_flight))

    def settle(self) -> None:
        """Wait for every load in flight; those that fail leave their experts absent."""
        for expert in list(self._in_flight):
            try:
                self.finish_load(expert)
            except Exception:
                continue  # the visit that asked for it raises already, or no longer wants it
        self.announce(())

    @property
    def _floor(self) -> int:
        return layer_floor(self.residency.num_slots, len(self._num_experts))

    def _start(self, load: Load, alongside: int) -> None:
        if load.victim is not None:
            self._evict(load.victim)
        slot = self.residency.start(load.expert)
        try:
            self._in_flight[load.expert] = self.slots.start(load.expert, slot, alongside)
        except Exception as error:
            self.residency.fail(load.expert)
            raise NotStartedError(error) from error

    @change
    def _land(self, expert: ExpertId, seconds: float) -> None:
        del self._in_flight[expert]
        self.link.loaded(seconds)
        self.tables.put(expert, self.residency.land(expert))
        self._unannounced.add(expert)

    @change
    def _fail(self, expert: ExpertId) -> None:
        del self._in_flight[expert]
        self._ahead.discard(expert)
        self.residency.fail(expert)

    def _receive_ahead(self) -> None:
        """Make experts resident whose loads ahead of demand have landed."""
        landed = [expert for expert in self._ahead if expert in self._in_flight and self.has_landed(expert)]
        for expert in sorted(landed):
            try:
                self.finish_load(expert)
            except Exception:
                logger.debug(f"{expert} could not be loaded ahead of demand", exc_info=True)
        if landed:
            self.announce(())

    def _cancel_ahead(self) -> None:
        """Cancel loads ahead of demand that have not begun: demand needs the link."""
        for expert in [expert for expert in self._ahead if expert in self._in_flight]:
            if expert not in self._asked and self._in_flight[expert].cancel():
                del self._in_flight[expert]
                self.residency.fail(expert)
                self._ahead.remove(expert)

    def _admit(self, expert: ExpertId) -> None:
        if expert in self._unannounced:
            self._unannounced.remove(expert)
            self._policy.admit(expert)

    def _evict(self, expert: ExpertId) -> None:
        if expert in self._ahead:
            self._ahead.remove(expert)
            self._stats[expert.layer].prefetch_wasted += 1
        self.tables.take_away(expert)
        self._policy.forget(expert)
        self.residency.evict(expert)
