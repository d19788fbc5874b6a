"""Keep experts resident and hand them to whoever computes: the face of a cache. Its steps are in `core.py`."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence, Set

from transformers_moe_offload.cache.change import change
from transformers_moe_offload.cache.core import CacheCore
from transformers_moe_offload.cache.planner import Load, plan_ahead
from transformers_moe_offload.cache.turn import Attempt, IsTakenError
from transformers_moe_offload.cache.visit import Visit
from transformers_moe_offload.expert import ExpertId


class ExpertCache(CacheCore):
    """The resident experts of some sparse layers on one device.

    One visit at a time: threads that share a model take turns layer by layer. The caller of a visit takes it,
    `with cache.turn, cache.visit(...) as visit`: what `with` does with a lock, Ctrl-C cannot come in between; a turn
    that some method of ours took or gave back would at times not be given back.
    """

    def visit(
        self,
        layer: int,
        wanted: Sequence[int],
        started: Callable[[Sequence[int]], None] | None = None,
        computed: Container[int] = (),
    ) -> Visit:
        """Ask for experts of a layer, each named once; the last ones are those most worth keeping for later. To be
        opened with the turn.

        `started` is called with the wanted experts once the visit's own loads are under way; not in a visit that has
        to go in waves, which leaves no room for anything else. Those `computed` by the host are wanted like the others,
        but neither loaded nor given to the caller.
        """
        return Visit(self, layer, [ExpertId(layer, expert) for expert in wanted], started, computed)

    def load_ahead(self, expert: ExpertId, spared: Set[ExpertId] = frozenset()) -> bool:
        """Start to bring in an expert that nobody has asked for yet; returns whether there was a slot to spare.

        Nobody who is `spared`, wanted or on the way has to leave for it.
        """
        try:
            with Attempt(self.turn):
                self.repair()
                return self._start_ahead(expert, spared)
        except IsTakenError:
            return False

    def warm(self, experts: Iterable[ExpertId]) -> None:
        """Bring experts into free slots before anybody asks for them, and wait until they are there."""
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
        """Change the number of slots between two visits. Who can stay stays; the policy says who leaves.

        If there is no memory for more of them, that is raised and there are as many as before.
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

    def give_back(self) -> None:
        """Give back memory that experts take although they have left, in case they return."""
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
