"""Keep experts resident and give layers their weights: the interface of a cache. Its steps are in `steps.py`."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence, Set

from transformers_moe_offload.cache.change import change
from transformers_moe_offload.cache.planner import Load, plan_ahead
from transformers_moe_offload.cache.steps import CacheSteps
from transformers_moe_offload.cache.turn import Attempt, IsTakenError
from transformers_moe_offload.cache.visit import Visit
from transformers_moe_offload.expert import ExpertId


class ExpertCache(CacheSteps):
    """The resident experts of some sparse layers on one device.

    One visit at a time: threads that share a model take turns layer by layer. The caller takes the turn,
    `with cache.turn, cache.visit(...) as visit`: Ctrl-C cannot interrupt what `with` does with a lock, but it could
    interrupt a method of ours that takes or releases the turn, and leave it locked.
    """

    def visit(
        self,
        layer: int,
        wanted: Sequence[int],
        started: Callable[[Sequence[int]], None] | None = None,
        on_host: Container[int] = (),
    ) -> Visit:
        """Ask for experts of a layer, each named once; the last ones are those most worth keeping for later. Open the
        visit with the turn held.

        `started` is called with the wanted experts once the visit's own loads are in flight, but not in a visit that
        goes in waves, which leaves no slot for other loads. Experts that are computed `on_host` are wanted like the
        others, but neither loaded nor given to the caller.
        """
        return Visit(self, layer, [*map(self._ids[layer].__getitem__, wanted)], started, on_host)

    def load_ahead(self, expert: ExpertId, spared: Set[ExpertId] = frozenset()) -> bool:
        """Start to load an expert ahead of demand; returns whether the load was started.

        It is not started while another thread has the turn, or if there is no slot to spare: experts that are `spared`,
        wanted by the latest visit, or loaded ahead of demand themselves are not evicted for it.
        """
        try:
            with Attempt(self.turn):
                self.repair()
                return self._start_ahead(expert, spared)
        except IsTakenError:
            return False

    def warm(self, experts: Iterable[ExpertId]) -> None:
        """Load experts into free slots ahead of demand, and wait until they are resident."""
        with self.turn:
            self.repair()
            coming = []
            for expert in experts:
                if self.residency.num_free and self.residency.is_absent(expert):
                    self.start(Load(expert, None))
                    coming.append(expert)
            try:
                for expert in coming:
                    self.finish_load(expert)
            finally:
                self.settle()

    def resize(self, num_slots: int) -> None:
        """Change the number of slots between two visits. Residents stay as far as they fit; the policy picks victims.

        If there is no memory for more slots, the error is raised and their number is what it was before.
        """
        with self.turn:
            self.repair()
            self.settle()
            num_before = self.residency.num_slots
            try:
                self._grow(num_slots)
            except Exception:
                self._shrink(num_before)
                raise
            self._shrink(num_slots)

    def clear(self) -> None:
        """Evict every expert, between two visits, with what the policy knows of them. Slots and statistics stay."""
        with self.turn:
            self.repair()
            self.settle()
            self._clear()
            self.slots.give_back()

    def give_back(self) -> None:
        """Give back memory that evicted experts still take in case they return."""
        with self.turn:
            self.repair()
            self.slots.give_back()

    @change
    def _start_ahead(self, expert: ExpertId, spared: Set[ExpertId]) -> bool:
        spared = self._asked | self._ahead | spared
        load = plan_ahead(expert, self.residency, self._policy.candidates(), spared, self._floor)
        if load is not None:
            self._start(load, len(self._in_flight))
            self._ahead.add(expert)
        return load is not None

    @change
    def _clear(self) -> None:
        for expert in sorted(self.residency.residents):
            self._evict(expert)
        self._asked = frozenset()
        self._policy = self._new_policy()

    def _grow(self, num_slots: int) -> None:
        while self.residency.num_slots < num_slots:
            self.slots.add(self.residency.next_slot())
            self._add_slot()

    @change
    def _add_slot(self) -> None:
        self.residency.add_slot()

    @change
    def _shrink(self, num_slots: int) -> None:
        while self.residency.num_slots > num_slots:
            if not self.residency.num_free:
                self._evict(next(iter(self._policy.candidates())))
            self.slots.remove(self.residency.remove_slot())
