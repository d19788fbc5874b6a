"""Keep experts resident and hand them to whoever computes. The only code that changes what is resident.

A layer opens a *visit* with the experts it wants. Inside the visit it is given each of them once, held for as long as
it is being used: `for expert, weights in visit` in the order in which they become available (residents first, then
loads as they land), or `visit.take(expert)` in an order of its own. Loads for the rest of the visit go on meanwhile;
if the layer wants more experts than there are slots, they pass through in waves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

from torch import Tensor

from transformers_moe_offload.cache.capacity import layer_floor
from transformers_moe_offload.cache.planner import plan
from transformers_moe_offload.cache.residency import Residency
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.memory.checkpoint import ExpertStore
from transformers_moe_offload.memory.slots import SlotPool
from transformers_moe_offload.memory.transfer import Copier, Transfer
from transformers_moe_offload.policies import EvictionPolicy
from transformers_moe_offload.stats import LayerStats

Weights = dict[str, Tensor]
"""One expert's tensors by field name. Views of a slot: they change when the slot is given to another expert."""


class ExpertCache:
    """The resident experts of some sparse layers on one device.

    One visit at a time: threads that share a model take turns layer by layer.
    """

    def __init__(
        self,
        store: ExpertStore,
        layers: Sequence[int],
        pool: SlotPool,
        policy: EvictionPolicy,
        copier: Copier,
    ) -> None:
        self.store = store
        self.pool = pool
        self.residency = Residency(len(pool))
        self.stats = {layer: LayerStats() for layer in layers}
        self._policy = policy
        self._copier = copier
        self._floor = layer_floor(len(pool), len(layers))
        self._in_flight: dict[ExpertId, Transfer] = {}
        self._turn = threading.RLock()

    def num_experts(self, layer: int) -> int:
        """Experts of a sparse layer."""
        return self.store.layers[layer].spec.num_experts

    def visit(self, layer: int, wanted: Sequence[int]) -> Visit:
        """Ask for experts of a layer, each named once, in the order in which they would best be used."""
        return Visit(self, layer, [ExpertId(layer, expert) for expert in wanted])

    # What follows is for `Visit`, which holds the turn.

    def start_loads(self, upcoming: Sequence[ExpertId]) -> bool:
        """Start as many loads as there is room for; returns whether some had to be left for later."""
        planned = plan(upcoming, self.residency, self._policy.candidates(), self._floor)
        for load in planned.loads:
            if load.victim is not None:
                self._policy.forget(load.victim)
                self.residency.evict(load.victim)
            slot = self.residency.start(load.expert)
            record = self.pool.record(slot)[: self.store.layout(load.expert.layer).nbytes]
            try:
                self._in_flight[load.expert] = self._copier.start(load.expert, record)
            except BaseException:
                self.residency.fail(load.expert)
                raise
        return bool(planned.deferred)

    def finish_load(self, expert: ExpertId) -> None:
        """Wait until an expert that is loading is resident; if its load fails it is absent again."""
        transfer = self._in_flight[expert]
        stats = self.stats[expert.layer]
        started = time.perf_counter()
        try:
            transfer.finish()
        except Exception:
            del self._in_flight[expert]
            self.residency.fail(expert)
            raise
        finally:  # a wait broken off by Ctrl-C leaves the load in flight: somebody may still be writing into the slot
            stats.stall_ms += (time.perf_counter() - started) * 1e3
        del self._in_flight[expert]
        self.residency.land(expert)
        self._policy.admit(expert)
        stats.disk_bytes += self.store.stored_bytes(expert)
        if self.pool.device.type != "cpu":
            stats.device_bytes += self.store.layout(expert.layer).nbytes

    def has_landed(self, expert: ExpertId) -> bool:
        """Whether an expert that is loading could be used without waiting."""
        return self._in_flight[expert].is_done()

    def use(self, expert: ExpertId) -> Weights:
        """The weights of a resident."""
        self._policy.use(expert)
        return self.pool.views(self.residency.slot(expert), self.store.layout(expert.layer))

    def retire(self, expert: ExpertId) -> None:
        """The work that reads a resident's weights has been submitted."""
        self._copier.retire(self.pool.record(self.residency.slot(expert)))

    def settle(self) -> None:
        """Wait for every load under way; those that fail leave their experts absent."""
        for expert in list(self._in_flight):
            try:
                self.finish_load(expert)
            except Exception:
                continue  # the visit that asked for it raises already, or no longer wants it


class Visit:
    """One layer's use of the experts it wants. Use it in a `with` block."""

    def __init__(self, cache: ExpertCache, layer: int, wanted: Sequence[ExpertId]) -> None:
        self._cache = cache
        self._layer = layer
        self._wanted = frozenset(wanted)
        self._upcoming = dict.fromkeys(wanted)
        self._has_deferred = False
        self._held: ExpertId | None = None
        self._held_weights: Weights = {}

    def __enter__(self) -> Visit:
        self._cache._turn.acquire()
        try:
            residency, stats = self._cache.residency, self._cache.stats[self._layer]
            for expert in self._upcoming:
                if residency.is_resident(expert):
                    stats.hits += 1
                elif residency.is_loading(expert):
                    stats.late_hits += 1
                else:
                    stats.misses += 1
        except BaseException:
            self._cache._turn.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._let_go()
            if kind is not None:
                self._cache.settle()
        finally:
            self._cache._turn.release()

    def __iter__(self) -> Iterator[tuple[int, Weights]]:
        """Each wanted expert once, as it becomes available, with its weights; they are valid for one step."""
        self._let_go()  # one taken before may have to make room
        residency = self._cache.residency
        # Residents first: the loads started here overlap with computing them.
        self._upcoming = dict.fromkeys(sorted(self._upcoming, key=lambda expert: not residency.is_resident(expert)))
        self._has_deferred = self._cache.start_loads(list(self._upcoming))
        while self._upcoming:
            expert = self._next_available()
            yield expert.expert, self.take(expert.expert)
            self._let_go()

    def in_order(self) -> Iterator[tuple[int, Weights]]:
        """Each wanted expert once, in the order in which they were asked for, whatever arrives first."""
        for expert in list(self._upcoming):
            yield expert.expert, self.take(expert.expert)

    def take(self, expert: int) -> Weights:
        """The weights of one wanted expert, held until the next one is taken or the visit ends.

        Taking the one that is held again costs nothing; any other may be taken again, too, and is loaded again if it
        had to make room meanwhile.
        """
        wanted = ExpertId(self._layer, expert)
        if wanted == self._held:
            return self._held_weights
        assert wanted in self._wanted, f"{wanted} was not asked for"
        self._let_go()
        residency = self._cache.residency
        if self._has_deferred or residency.is_absent(wanted):
            self._upcoming.pop(wanted, None)
            self._has_deferred = self._cache.start_loads([wanted, *self._upcoming])
            if residency.is_absent(wanted):  # visits that ended early left slots loading, and nobody else may leave
                self._cache.settle()
                self._has_deferred = self._cache.start_loads([wanted, *self._upcoming])
        if residency.is_loading(wanted):
            self._cache.finish_load(wanted)
        self._upcoming.pop(wanted, None)
        self._held_weights = self._cache.use(wanted)
        self._held = wanted
        return self._held_weights

    def wants(self, expert: int) -> bool:
        """Whether the visit asked for this expert."""
        return ExpertId(self._layer, expert) in self._wanted

    def _next_available(self) -> ExpertId:
        """A resident if there is one, else a load that has landed, else the one that started first."""
        residency, cache = self._cache.residency, self._cache
        loading = []
        for expert in self._upcoming:
            if residency.is_resident(expert):
                return expert
            if residency.is_loading(expert):
                if cache.has_landed(expert):
                    return expert
                loading.append(expert)
        return loading[0] if loading else next(iter(self._upcoming))

    def _let_go(self) -> None:
        if self._held is not None:
            self._cache.retire(self._held)
            self._held = None
            self._held_weights = {}
