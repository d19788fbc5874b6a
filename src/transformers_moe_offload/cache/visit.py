"""One layer's use of the experts it wants.

A visit yields each wanted expert once and holds it while it is used: `visit.batches()` yields those that are available
together, `for expert, weights in visit` one after the other, residents first, then loads as they land, and
`visit.take(expert)` the one that is asked for. Loads for the rest of the visit go on meanwhile; if the layer wants more
experts than there are slots, they pass through in waves.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from types import TracebackType
from typing import Any

from transformers_moe_offload.cache.planner import order_of_use
from transformers_moe_offload.cache.steps import CacheSteps
from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.store.layer_source import Weights


def _times_taken(turn: Any) -> int:
    """How often the thread that has the turn has taken it; 1 where Python does not tell (before 3.11.5)."""
    count = getattr(turn, "_recursion_count", None)
    return 1 if count is None else int(count())


class Visit:
    """One layer's use of the experts it wants. Use it in a `with` block, inside of one that has the cache's turn."""

    def __init__(
        self,
        cache: CacheSteps,
        layer: int,
        wanted: Sequence[ExpertId],
        started: Callable[[Sequence[int]], None] | None,
        on_host: Container[int] = (),
    ) -> None:
        self._cache = cache
        self._layer = layer
        self._wanted: dict[ExpertId, None] = dict.fromkeys(wanted)
        self._on_host = on_host
        self._are_all_resident = False
        upcoming = [one for one in wanted if one.expert not in on_host] if on_host else wanted
        self._upcoming: dict[ExpertId, None] = dict.fromkeys(upcoming)
        self._used: dict[ExpertId, None] = {}
        """Experts taken since the policy was last told of this visit."""
        self._started = started
        self._has_deferred = False
        self._in_waves = False
        self._held: ExpertId | None = None
        self._held_weights: Weights = {}

    def __enter__(self) -> Visit:
        assert self._cache.turn._is_owned(), "open a visit with the turn: `with cache.turn, cache.visit(...) as visit`"  # type: ignore[attr-defined]
        if _times_taken(self._cache.turn) > 1:
            raise MoeOffloadError(
                f"sparse layer {self._layer} is asked for experts while a layer of this model computes with others, "
                f"which they could replace: a hook inside of an experts module calls the model. Call it before or "
                f"after the outer forward, or call a copy.deepcopy of it"
            )
        if not self._cache.is_whole:
            self._cache.repair()
        self._are_all_resident = self._cache.begin(self._layer, list(self._wanted), self._on_host)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._cache.is_whole:  # a change was interrupted in the middle: the next visit repairs it
            return
        self._let_go()
        if kind is not None:
            self._cache.settle()
        order = self._used if self._in_waves else self._wanted
        self._cache.announce([expert for expert in order if expert in self._used])

    def __iter__(self) -> Iterator[tuple[int, Weights]]:
        """Each wanted expert once, as it becomes available, with its weights; they are valid for one step."""
        self._begin_loads()
        yield from self._one_by_one()

    def batches(self) -> Iterator[dict[int, Weights]]:
        """Each wanted expert once: those that are available together, then the others as they become so.

        Weights are valid until the next batch is asked for.
        """
        if self._are_all_resident and not self._used:
            together = list(self._upcoming)
            self._used, self._upcoming = self._upcoming, {}
            self._tell_started()
            yield self._cache.weights(together)
            self._cache.retire(together)
            return
        self._begin_loads()
        while self._upcoming and not self._in_waves:
            self._tell_started()
            together = list(filter(self._is_available, self._upcoming)) or [next(iter(self._upcoming))]
            for expert in together:
                if self._cache.residency.is_loading(expert):
                    self._cache.finish_load(expert)
                del self._upcoming[expert]
                self._used[expert] = None
            yield self._cache.weights(together)
            self._cache.retire(together)
        for number, weights in self._one_by_one():
            yield {number: weights}

    def _one_by_one(self) -> Iterator[tuple[int, Weights]]:
        while self._upcoming:
            expert = next(iter(self._upcoming)) if self._in_waves else self._next_available()
            yield expert.expert, self.take(expert.expert)
            self._let_go()

    def _begin_loads(self) -> None:
        """Start as many loads as there is room for, and fix the order in which experts are used."""
        self._let_go()  # an expert taken before may have to be evicted
        residency = self._cache.residency
        # Residents first: the loads started here overlap with computing them.
        wanted = list(self._upcoming)
        self._upcoming = dict.fromkeys(order_of_use(wanted, residency))
        self._start_loads(list(self._upcoming))
        self._in_waves = self._has_deferred
        if self._in_waves:
            num_slots = residency.count(self._layer)
            self._upcoming = dict.fromkeys(order_of_use(wanted, residency, num_slots))

    def in_order(self) -> Iterator[tuple[int, Weights]]:
        """Each wanted expert once, in ascending order, whatever arrives first."""
        for expert in sorted(self._upcoming):
            yield expert.expert, self.take(expert.expert)

    def take(self, expert: int) -> Weights:
        """The weights of one wanted expert, held until the next one is taken or the visit ends.

        Taking the held expert again costs nothing. Any other may be taken again, too, and is loaded again if it was
        evicted meanwhile.
        """
        wanted = ExpertId(self._layer, expert)
        if wanted == self._held:
            return self._held_weights
        assert wanted in self._wanted, f"{wanted} was not asked for"
        self._let_go()
        residency = self._cache.residency
        if self._has_deferred or residency.is_absent(wanted):
            self._upcoming.pop(wanted, None)
            self._start_loads([wanted, *self._upcoming])
            if residency.is_absent(wanted):  # visits that ended early left slots loading; no other resident may leave
                self._cache.settle()
                self._start_loads([wanted, *self._upcoming])
        self._tell_started()
        if residency.is_loading(wanted):
            self._cache.finish_load(wanted)
        self._upcoming.pop(wanted, None)
        self._held_weights = self._cache.weights((wanted,))[expert]
        self._held = wanted
        self._used[wanted] = None
        return self._held_weights

    def wants(self, expert: int) -> bool:
        """Whether the visit asked for this expert."""
        return ExpertId(self._layer, expert) in self._wanted

    def _tell_started(self) -> None:
        if self._started is not None and not self._has_deferred:
            self._started([expert.expert for expert in self._wanted])
        self._started = None

    def _next_available(self) -> ExpertId:
        """A resident if there is one, else a load that has landed, else the one that started first."""
        available = next(filter(self._is_available, self._upcoming), None)
        loading = next(filter(self._cache.residency.is_loading, self._upcoming), None)
        return available or loading or next(iter(self._upcoming))

    def _is_available(self, expert: ExpertId) -> bool:
        """Whether an expert can be used without waiting."""
        residency = self._cache.residency
        return residency.is_resident(expert) or (residency.is_loading(expert) and self._cache.has_landed(expert))

    def _start_loads(self, upcoming: Sequence[ExpertId]) -> None:
        """Start loads, after the policy is told which experts were used: its choice of victims depends on that."""
        self._cache.announce(self._used)
        self._used = {}
        self._has_deferred = self._cache.start_loads(upcoming)

    def _let_go(self) -> None:
        if self._held is not None:
            self._cache.retire((self._held,))
            self._held = None
            self._held_weights = {}
