"""Play a trace again with another policy or another number of slots, and count.

The cache of a replay, its planner and its floors are those that a model runs with; only the slots hold nothing. So
without prefetching a replay has exactly the hits of a run. Only Belady's oracle is played by rules of its own: it is
the limit for any policy, so the restrictions on other policies must not lower it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import ORACLE, Belady, make_policy
from transformers_moe_offload.slots.transfer import Landed, Transfer
from transformers_moe_offload.stats import LayerStats
from transformers_moe_offload.store.layer_source import Weights
from transformers_moe_offload.tracing.trace import Trace


@dataclass(frozen=True)
class Replay:
    """The counts of one policy on a trace, with so many slots."""

    policy: str
    num_slots: int
    per_layer: Mapping[int, LayerStats]

    @property
    def hits(self) -> int:
        """Experts that were resident when they were asked for."""
        return sum(stats.hits for stats in self.per_layer.values())

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were resident; 0 if none were."""
        asked = sum(stats.asked for stats in self.per_layer.values())
        return self.hits / asked if asked else 0.0


def replay(trace: Trace, policy: str, num_slots: int) -> Replay:
    """Play a trace from an empty cache, all its layers sharing `num_slots` slots.

    `policy` is a name given to `register_policy`, or `belady`.
    """
    if num_slots < 1:
        raise ConfigError(f"a replay needs 1 slot or more, not {num_slots}")
    if policy == ORACLE:
        return Replay(policy, num_slots, _consult_oracle(trace, num_slots))
    # Slots beyond the number of experts that are ever asked for stay empty; `num_slots` may come from a file.
    used = {(layer, expert) for layer, wanted in trace.requests() for expert in wanted}
    cache = ExpertCache(
        NoSlots(), min(num_slots, max(1, len(used))), dict(enumerate(trace.num_experts)), make_policy(policy)
    )
    for layer, wanted in trace.requests():
        with cache.turn, cache.visit(layer, wanted) as visit:
            for _ in visit:
                pass
    return Replay(policy, num_slots, cache.stats)


def _consult_oracle(trace: Trace, num_slots: int) -> dict[int, LayerStats]:
    """The most hits that a cache can have without loading ahead of demand.

    After a visit it keeps the experts wanted soonest, of all that were in a slot before or during the visit; but one of
    the visit's own must be among them, because the last one computed still occupies its slot. Every cache keeps some of
    the same experts under the same condition, and those wanted soonest are the best choice.
    """
    requests = trace.requests()
    policy = Belady(requests)
    residents: set[ExpertId] = set()
    stats = {layer: LayerStats() for layer in range(trace.num_layers)}
    for layer, wanted in requests:
        experts = [ExpertId(layer, expert) for expert in wanted]
        policy.begin(layer, experts)
        for expert in experts:
            if expert in residents:
                stats[layer].hits += 1
            else:
                stats[layer].misses += 1
                policy.admit(expert)
                residents.add(expert)
            policy.use(expert)
        staying = set(experts)
        while len(residents) > num_slots:
            victim = next(expert for expert in policy.candidates() if staying != {expert})
            policy.forget(victim)
            residents.remove(victim)
            staying.discard(victim)
    return stats


class NoSlots:
    """Slots that hold nothing: loads land at once."""

    num_lanes = 1
    retire = None
    lost = None
    sure_for = math.inf
    are_files_unchanged = None

    @property
    def weights(self) -> Mapping[int, Weights]:
        """No weights in any slot."""
        return defaultdict(dict)

    def add(self, slot: int) -> None:
        """Nothing to make."""

    def remove(self, slot: int) -> None:
        """Nothing to give up."""

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> Transfer:
        """Nothing to bring."""
        return Landed(from_files=0)

    def give_back(self) -> None:
        """No memory was taken."""

    def start_over(self, held: Mapping[int, ExpertId]) -> None:
        """No load is ever in flight."""

    def device_bytes(self, expert: ExpertId) -> int:
        """No bytes."""
        return 0
